// PyTorch's allocator of CPU memory with guards around every block, for tests/support/guards.py: whoever writes past a tensor
// breaks them, by scalar code and by masked vectors alike, and whoever reads past it reads NaN. Blocks hold NaN at first,
// too: an element that is left out cannot pass for zero.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

constexpr size_t kGuard = 192;  // bytes on each side: three vectors of the widest kind, and blocks stay aligned to 64
constexpr unsigned char kPattern[] = {0xf5, 0xff};  // NaNs of either type, as no arithmetic makes them
constexpr unsigned char kFresh = 0xff;
std::atomic<long> blocks{0}, broken{0};

struct Header {
  size_t bytes;
};

unsigned char* guard_of(void* data) { return static_cast<unsigned char*>(data) - kGuard; }

void fill(unsigned char* p, size_t n) {
  for (size_t i = 0; i < n; ++i) p[i] = kPattern[reinterpret_cast<uintptr_t>(p + i) % 2];
}

bool whole(const unsigned char* p, size_t n) {
  for (size_t i = 0; i < n; ++i)
    if (p[i] != kPattern[reinterpret_cast<uintptr_t>(p + i) % 2]) return false;
  return true;
}

void release(void* data) {
  unsigned char* start = guard_of(data);
  Header header;
  std::memcpy(&header, start, sizeof header);
  const bool fine = whole(start + sizeof header, kGuard - sizeof header) &&
                    whole(static_cast<unsigned char*>(data) + header.bytes, kGuard);
  if (!fine) ++broken;
  std::free(start);
}

struct Guarded final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const size_t all = (n + 2 * kGuard + 63) / 64 * 64;
    auto* start = static_cast<unsigned char*>(std::aligned_alloc(64, all));
    if (!start) throw std::bad_alloc();
    fill(start, kGuard);
    fill(start + kGuard + n, all - kGuard - n);
    const Header header{n};
    std::memcpy(start, &header, sizeof header);
    std::memset(start + kGuard, kFresh, n);
    ++blocks;
    void* data = start + kGuard;
    return {data, data, &release, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

Guarded guarded;
c10::Allocator* before = nullptr;

}  // namespace

extern "C" {

void install() {
  before = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&guarded);
}

void uninstall() { c10::SetCPUAllocator(before); }

// Blocks that were handed out, and those of them that came back with a broken guard.
long count_blocks() { return blocks; }
long count_broken() { return broken; }
}
