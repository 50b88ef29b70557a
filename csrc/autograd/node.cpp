// The module vvae_fast._C_node: what vvae_fast/autograd.py does for an ordinary call, as nodes of libtorch's engine. A
// small flow takes less time than Python's autograd Function alone.
//
// libtorch's C++ interface changes from release to release: vvae_fast/node.py uses this module with the torch that it
// was built for, and with no other.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <tuple>

namespace vvae {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                   int64_t, double, double, bool);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                            const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                            int64_t, double, double, bool);
using BackwardPacked = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                  const Tensor&, int64_t, int64_t, double, double, bool);

template <class F>
c10::TypedOperatorHandle<F> find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("vvae_fast::" + name).c_str(), "").typed<F>();
}

// What a step computes, shapes.Formulas.numbers(), and the operators of the backend that computes it.
struct How {
  int64_t constraint, activation;
  double slope, log_det_eps;
  std::string prefix;  // of the operators' names
  c10::TypedOperatorHandle<Forward> forward;
  c10::TypedOperatorHandle<Backward> backward;
  c10::TypedOperatorHandle<BackwardPacked> backward_packed;
  const How* next;

  bool is(int64_t c, int64_t a, double s, double e, const std::string& p) const {
    const auto equal = [](double x, double y) { return std::memcmp(&x, &y, sizeof x) == 0; };  // NaN is itself
    return constraint == c && activation == a && equal(slope, s) && equal(log_det_eps, e) && prefix == p;
  }
};

// The one How of these arguments. None is ever freed: a graph holds its address.
const How& how_of(int64_t constraint, int64_t activation, double slope, double log_det_eps, const std::string& prefix) {
  static std::atomic<const How*> first{nullptr};
  static std::mutex mutex;
  const auto found = [&]() -> const How* {
    for (const How* how = first.load(); how; how = how->next)
      if (how->is(constraint, activation, slope, log_det_eps, prefix)) return how;
    return nullptr;
  };
  if (const How* how = found()) return *how;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const How* how = found()) return *how;
  first = new How{constraint,
                  activation,
                  slope,
                  log_det_eps,
                  prefix,
                  find<Forward>(prefix + "planar_forward"),
                  find<Backward>(prefix + "planar_backward"),
                  find<BackwardPacked>(prefix + "planar_backward_packed"),
                  first};
  return *first;
}

void save(AutogradContext* ctx, const How& how) { ctx->saved_data["how"] = reinterpret_cast<int64_t>(&how); }

const How& saved_how(AutogradContext* ctx) {
  return *reinterpret_cast<const How*>(ctx->saved_data["how"].toInt());
}

// Views of packed [R, K (2 D + 1)], as ops.unpack's: u, w [R, K, D] and b [R, K].
std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& packed, int64_t steps, int64_t dim) {
  const auto part = [&](int64_t start, int64_t size) { return packed.narrow(1, start, size); };
  return {part(0, steps * dim).unflatten(1, {steps, dim}), part(steps * dim, steps * dim).unflatten(1, {steps, dim}),
          part(2 * steps * dim, steps)};
}

// z_K [R, D], log_det [R] and a [K, R], empty unless `save`.
std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                                               const How& how, bool save) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return how.forward.call(z, u, w, b, how.constraint, how.activation, how.slope, how.log_det_eps, save);
}

// The gradients of both outputs, of which one was not used.
void zeros_for_undefined(Tensor& grad_z, Tensor& grad_log_det, const Tensor& z) {
  if (!grad_z.defined()) grad_z = at::zeros_like(z);
  if (!grad_log_det.defined()) grad_log_det = at::zeros({z.size(0)}, z.options());
}

// dz, du, dw and db for gradients that are differentiated once more: the reference's, in Python.
std::tuple<Tensor, Tensor, Tensor, Tensor> differentiable(const Tensor& grad_z, const Tensor& grad_log_det,
                                                          const Tensor& z, const Tensor& u, const Tensor& w,
                                                          const Tensor& b, const How& how) {
  const pybind11::gil_scoped_acquire gil;
  const auto backward = pybind11::module_::import("vvae_fast.autograd").attr("reference_backward");
  const auto numbers = pybind11::make_tuple(how.constraint, how.activation, how.slope, how.log_det_eps);
  return backward(grad_z, grad_log_det, z, u, w, b, numbers).cast<std::tuple<Tensor, Tensor, Tensor, Tensor>>();
}

}  // namespace

// Not in the namespace without a name: these names are what str(z_K.grad_fn) says.
struct PlanarFlow : torch::autograd::Function<PlanarFlow> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
                               const How& how) {
    const auto [z_K, log_det, a] = run_forward(z, u, w, b, how, true);
    ctx->save_for_backward({z, u, w, b, a});
    save(ctx, how);
    ctx->set_materialize_grads(false);
    return {z_K, log_det};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor &grad_z = grads[0], &grad_log_det = grads[1];
    if (!grad_z.defined() && !grad_log_det.defined()) return variable_list(5);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &z = saved[0], &u = saved[1], &w = saved[2], &b = saved[3], &a = saved[4];
    const How& how = saved_how(ctx);
    zeros_for_undefined(grad_z, grad_log_det, z);
    if (at::GradMode::is_enabled()) {
      const auto [dz, du, dw, db] = differentiable(grad_z, grad_log_det, z, u, w, b, how);
      return {dz, du, dw, db, Tensor()};
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool params = ctx->needs_input_grad(1) || ctx->needs_input_grad(2) || ctx->needs_input_grad(3);
    const auto [dz, du, dw, db] = how.backward.call(grad_z, grad_log_det, z, u, w, b, a, how.constraint, how.activation,
                                                    how.slope, how.log_det_eps, params);
    if (!params) return {dz, Tensor(), Tensor(), Tensor(), Tensor()};
    return {dz, du, dw, db, Tensor()};
  }
};

struct PackedPlanarFlow : torch::autograd::Function<PackedPlanarFlow> {
  static variable_list forward(AutogradContext* ctx, const Tensor& z, const Tensor& packed, int64_t steps,
                               const How& how) {
    const auto [u, w, b] = unpack(packed, steps, z.size(1));
    const auto [z_K, log_det, a] = run_forward(z, u, w, b, how, true);
    ctx->save_for_backward({z, packed, a});
    save(ctx, how);
    ctx->set_materialize_grads(false);
    return {z_K, log_det};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor &grad_z = grads[0], &grad_log_det = grads[1];
    if (!grad_z.defined() && !grad_log_det.defined()) return variable_list(4);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &z = saved[0], &packed = saved[1], &a = saved[2];
    const How& how = saved_how(ctx);
    zeros_for_undefined(grad_z, grad_log_det, z);
    if (at::GradMode::is_enabled()) {
      const auto [u, w, b] = unpack(packed, a.size(0), z.size(1));
      const auto [dz, du, dw, db] = differentiable(grad_z, grad_log_det, z, u, w, b, how);
      return {dz, at::cat({du.flatten(1), dw.flatten(1), db}, 1), Tensor(), Tensor()};
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool params = ctx->needs_input_grad(1);
    const auto [dz, dpacked] = how.backward_packed.call(grad_z, grad_log_det, z, packed, a, how.constraint,
                                                        how.activation, how.slope, how.log_det_eps, params);
    return {dz, params ? dpacked : Tensor(), Tensor(), Tensor()};
  }
};

namespace {

using Outputs = std::tuple<Tensor, Tensor>;

Outputs planar_flow(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, int64_t constraint,
                    int64_t activation, double slope, double log_det_eps, const std::string& prefix) {
  const How& how = how_of(constraint, activation, slope, log_det_eps, prefix);
  if (at::GradMode::is_enabled() &&
      (z.requires_grad() || u.requires_grad() || w.requires_grad() || b.requires_grad())) {
    const variable_list outputs = PlanarFlow::apply(z, u, w, b, how);
    return {outputs[0], outputs[1]};
  }
  const auto [z_K, log_det, a] = run_forward(z, u, w, b, how, false);
  return {z_K, log_det};
}

Outputs packed_planar_flow(const Tensor& z, const Tensor& packed, int64_t steps, int64_t constraint, int64_t activation,
                           double slope, double log_det_eps, const std::string& prefix) {
  const How& how = how_of(constraint, activation, slope, log_det_eps, prefix);
  if (at::GradMode::is_enabled() && (z.requires_grad() || packed.requires_grad())) {
    const variable_list outputs = PackedPlanarFlow::apply(z, packed, steps, how);
    return {outputs[0], outputs[1]};
  }
  const auto [u, w, b] = unpack(packed, steps, z.size(1));
  const auto [z_K, log_det, a] = run_forward(z, u, w, b, how, false);
  return {z_K, log_det};
}

// Whether torch.func, torch.jit.trace or a torch function mode looks on.
bool is_observed() {
  const auto& included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) || torch::jit::tracer::isTracing() ||
         at::impl::torch_function_mode_enabled();
}

// A tensor or parameter; null for anything else, subclasses too.
const Tensor* plain(pybind11::handle object) {
  return THPVariable_CheckExact(object.ptr()) ? &THPVariable_Unpack(object.ptr()) : nullptr;
}

bool is_full_precision(const Tensor& z) { return z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble; }

// shapes.are_ordinary, of a call that nobody observes.
bool is_ordinary(pybind11::handle z_, pybind11::handle u_, pybind11::handle w_, pybind11::handle b_) {
  if (is_observed()) return false;
  const Tensor *z = plain(z_), *u = plain(u_), *w = plain(w_), *b = plain(b_);
  if (!z || !u || !w || !b || !is_full_precision(*z)) return false;
  const auto type = z->scalar_type();
  return u->scalar_type() == type && w->scalar_type() == type && b->scalar_type() == type && z->dim() == 2 &&
         z->size(1) > 0 && (u->dim() == 2 || (u->dim() == 3 && u->size(0) == z->size(0)));
}

// shapes.is_ordinary_packed, of a call that nobody observes.
bool is_ordinary_packed(pybind11::handle z_, pybind11::handle packed_, pybind11::handle steps_, pybind11::handle dim_) {
  if (is_observed() || !PyLong_CheckExact(steps_.ptr()) || !PyLong_CheckExact(dim_.ptr())) return false;
  const Tensor *z = plain(z_), *packed = plain(packed_);
  if (!z || !packed || !is_full_precision(*z) || packed->scalar_type() != z->scalar_type()) return false;
  if (z->dim() != 2 || packed->dim() != 2 || packed->size(0) != z->size(0)) return false;
  const int64_t steps = PyLong_AsLongLong(steps_.ptr()), dim = z->size(1);
  PyErr_Clear();  // a number beyond 2^63 is -1
  return steps >= 0 && dim > 0 && pybind11::int_(dim).equal(dim_) && packed->size(1) % (2 * dim + 1) == 0 &&
         packed->size(1) / (2 * dim + 1) == steps;
}

}  // namespace
}  // namespace vvae

PYBIND11_MODULE(_C_node, m) {
  using torch::wrap_pybind_function_no_gil;  // lets exceptions of PyTorch and of Python's hooks pass as they are
  m.doc() = "An ordinary call of the flow, as a node of libtorch's engine.";
  m.def("is_ordinary", &vvae::is_ordinary, "Whether planar_flow takes z, u, w, b.");
  m.def("is_ordinary_packed", &vvae::is_ordinary_packed, "Whether packed_planar_flow takes z, packed, steps, dim.");
  m.def("planar_flow", wrap_pybind_function_no_gil(&vvae::planar_flow), "autograd.planar_flow of an ordinary call.");
  m.def("packed_planar_flow", wrap_pybind_function_no_gil(&vvae::packed_planar_flow),
        "autograd.packed_planar_flow of an ordinary call.");
  m.def("torch_version", [] { return VVAE_FAST_TORCH_VERSION; }, "The torch that this module serves.");
}
