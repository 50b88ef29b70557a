// Runs the launchers of csrc/cuda on the problems of a file, tests/cuda/cuda_host.py's: run PROBLEMS ANSWERS
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "launch.h"

namespace vvae {
namespace cuda {
namespace {

// Bytes on the heap, no more than asked for: AddressSanitizer sees what lies behind them.
class Bytes {
 public:
  explicit Bytes(int64_t size) : size_(size), data_(new char[static_cast<size_t>(size)]) {}
  char* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<char[]> data_;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit);
  }
  int64_t number() { return read<int64_t>(); }
  double real() { return read<double>(); }
  Bytes bytes() {
    Bytes bytes(number());
    file_.read(bytes.data(), bytes.size());
    return bytes;
  }

 private:
  template <class T>
  T read() {
    T x = 0;
    file_.read(reinterpret_cast<char*>(&x), sizeof(x));
    return x;
  }
  std::ifstream file_;
};

class Writer {
 public:
  explicit Writer(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit);
  }
  void number(int64_t n) { file_.write(reinterpret_cast<const char*>(&n), sizeof(n)); }
  void bytes(const char* data, int64_t size) {
    number(size);
    file_.write(data, size);
  }

 private:
  std::ofstream file_;
};

struct Input {
  Bytes bytes;
  int64_t offset, strides[3];

  explicit Input(Reader& from) : bytes(from.bytes()), offset(from.number()) {
    for (int64_t& stride : strides) stride = from.number();
  }
  const void* data() const { return bytes.data() + offset; }
  Column<const void> column() const { return {data(), strides[0]}; }
  Matrix<const void> matrix() const { return {data(), strides[0], strides[1]}; }
  Params<const void> params() const { return {data(), strides[0], strides[1], strides[2]}; }
};

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

Bytes watched(const char* name, int64_t elements, int64_t size, bool output = true) {
  Bytes bytes(elements * size);
  host::owners.watch(name, bytes.data(), bytes.size(), int(size), output);
  return bytes;
}

struct Inputs {
  Input z, u, w, b, grad_z, grad_log_det;

  explicit Inputs(Reader& from) : z(from), u(from), w(from), b(from), grad_z(from), grad_log_det(from) {}
};

// To the answers: what went wrong in the launches, if anything.
template <class F>
void run(const char* pass, Writer& to, const F& launches) {
  std::string error;
  try {
    launches();
    error = host::owners.finish();
  } catch (const std::runtime_error& failed) {
    host::owners.finish();
    error = failed.what();
  }
  if (!error.empty()) error = std::string(pass) + ": " + error;
  to.bytes(error.data(), int64_t(error.size()));
}

void write(Writer& to, std::initializer_list<const Bytes*> outputs) {
  for (const Bytes* x : outputs) to.bytes(x->data(), x->size());
}

int64_t computed_size(const Problem& p) { return p.dtype == Dtype::float64 ? 8 : 4; }

// dz, du, dw and db. Packed: the gradients of u, w and b of each set concatenated, as a linear head's output.
void run_backward(Writer& to, const Problem& p, const Inputs& inputs, const Bytes& a, bool packed) {
  const int64_t size = size_of(p.dtype), D = p.dim, K = p.steps;
  const Bytes dz = watched("dz", p.rows * D, size);
  const Bytes du = packed ? watched("dpacked", p.sets * K * (2 * D + 1), size) : watched("du", p.sets * K * D, size);
  const Bytes dw = watched("dw", packed ? 0 : p.sets * K * D, size), db = watched("db", packed ? 0 : p.sets * K, size);
  const auto gradients = [&](const Bytes& alone, int64_t before, int64_t step) {
    if (packed) return Params<void>{du.data() + before * size, K * (2 * D + 1), step, 1};
    return Params<void>{alone.data(), K * step, step, 1};
  };
  const int64_t workspace_size = workspace_bytes(p);
  if (workspace_size % 4) throw std::runtime_error("the workspace is not of whole numbers");
  const Bytes workspace = watched("workspace", workspace_size / 4, 4, false);
  run("backward", to, [&] {
    launch_backward({p, inputs.grad_z.matrix(), inputs.grad_log_det.column(), {a.data(), p.rows, 1}, {dz.data(), D, 1},
                     gradients(du, 0, D), gradients(dw, K * D, D), gradients(db, 2 * K * D, 1), workspace.data()},
                    nullptr);
  });
  write(to, {&dz, &du, &dw, &db});
}

// The flow or its inverse, and the backward.
void run_both(Writer& to, const Problem& p, const Inputs& inputs, bool save, bool packed) {
  const int64_t size = size_of(p.dtype), computed = computed_size(p), D = p.dim, K = p.steps;
  const Bytes z_K = watched("z_K", p.rows * D, size), log_det = watched("log_det", p.rows, computed),
              a = watched("a", save ? K * p.rows : 0, computed);
  run("forward", to, [&] { launch_forward({p, {z_K.data(), D, 1}, {log_det.data(), 1}, {save ? a.data() : nullptr, p.rows, 1}}, nullptr); });
  write(to, {&z_K, &log_det, &a});
  if (save) run_backward(to, p, inputs, a, packed);
}

void run_problem(Reader& from, Writer& to) {
  Problem p = {};
  p.dtype = Dtype(from.number());
  p.spec.constraint = Constraint(from.number()), p.spec.activation = Activation(from.number());
  p.spec.slope = from.real(), p.spec.log_det_eps = from.real();
  p.amortized = from.number() != 0;
  p.rows = from.number(), p.sets = from.number();
  p.dim = from.number(), p.steps = from.number();
  set_form(Form(from.number()));
  host::order_of_blocks = from.number();
  const bool save = from.number() != 0, packed = from.number() != 0;
  p.inverse = from.number() != 0;
  const Inputs inputs(from);
  p.z = inputs.z.matrix(), p.u = inputs.u.params(), p.w = inputs.w.params(), p.b = inputs.b.params();
  if (!computes(p)) throw std::runtime_error("the kernels do not compute these formulas");
  run_both(to, p, inputs, save, packed);
}

}  // namespace
}  // namespace cuda
}  // namespace vvae

int main(int, char** argv) {
  vvae::cuda::Reader from(argv[1]);
  vvae::cuda::Writer to(argv[2]);
  for (int64_t left = from.number(); left > 0; --left) {
    vvae::cuda::run_problem(from, to);
    std::cout << "." << std::flush;  // how many were done before one that ends the process
  }
  to.number(int64_t(vvae::cuda::host::kernels_run.size()));
  for (const void* kernel : vvae::cuda::host::kernels_run)
    to.number(reinterpret_cast<intptr_t>(kernel) - reinterpret_cast<intptr_t>(&vvae::cuda::launch_forward));
}
