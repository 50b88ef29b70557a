// Which kernels a problem runs on. No kernel is here.
#include <atomic>

#include "reduce/partials.cuh"

namespace vvae {
namespace cuda {
namespace {

std::atomic<Form> asked_form{Form::automatic};

constexpr int64_t kFewSamples = 16;  // of a set: from here on its gradients are sums of products, below it they are added

bool shares(const Problem& p) { return !p.amortized || p.rows / p.sets >= kFewSamples; }

// The compact form's products are on tensor cores, for numbers that are computed in float32, and its kernels know the
// usual spec. By those, dtype, D and K alone: a row's bits do not depend on how many rows there are. Not measured on
// a GPU: below this the direct form's latency is the shorter by a count of instructions.
bool is_compact(const Problem& p) {
  constexpr int least_dim = 49, least_steps = 8;
  const Form form = asked_form.load();
  if (p.inverse) return false;
  const bool by_shape = form == Form::automatic && p.dim >= least_dim && p.steps >= least_steps;
  if (p.dtype == Dtype::float64 || !p.spec.is_usual() || !(by_shape || form == Form::compact)) return false;
  return compact_bytes(p.dim) <= most_shared_bytes();  // last: it asks the driver
}

}  // namespace

void set_form(Form form) { asked_form.store(form); }

int64_t most_dim(Dtype dtype) { return dtype == Dtype::float64 ? 512 : 1024; }

bool computes(const Problem& p) {
  return p.spec.is_usual() || p.dtype == Dtype::float32 || p.dtype == Dtype::float64;
}

int64_t workspace_bytes(const Problem& p) {
  if (!shares(p)) return amortized_backward_bytes(p);
  return is_compact(p) ? compact_backward_bytes(p) : shared_backward_bytes(p);
}

void launch_forward(const Forward& f, void* stream) {
  if (!shares(f)) return launch_amortized_forward(f, stream);
  if (f.inverse) return launch_shared_inverse(f, stream);
  return is_compact(f) ? launch_compact_forward(f, stream) : launch_shared_forward(f, stream);
}

void launch_backward(const Backward& f, void* stream) {
  if (!shares(f)) return launch_amortized_backward(f, stream);
  return is_compact(f) ? launch_compact_backward(f, stream) : launch_shared_backward(f, stream);
}

}  // namespace cuda
}  // namespace vvae
