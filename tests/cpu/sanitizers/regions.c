/* Parallel regions that end and begin as OpenMP promises or, with an argument, a race inside one. Its own code alone is
 * instrumented, as ours is in PyTorch: tests/cpu/test_sanitized.py asks what ThreadSanitizer says with and without
 * fork_join.c. */
#include <stdio.h>

int main(int count, char **arguments) {
  long numbers[4] = {0}, sum = 0, shared = 0;
  const int race = count > 1;
  (void)arguments;
  for (int round = 0; round < 50; ++round) {
    for (int i = 0; i < 4; ++i) numbers[i] += round; /* before the region */
#pragma omp parallel for num_threads(4) schedule(static, 1)
    for (int i = 0; i < 4; ++i) {
      numbers[i] *= 2;
      if (race) ++shared;
    }
    for (int i = 0; i < 4; ++i) sum += numbers[i]; /* after it */
  }
  printf("%ld\n", sum + shared);
  return 0;
}
