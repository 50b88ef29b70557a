// The module vvae_fast._C_node: what vvae_fast/autograd.py does for an ordinary call, as nodes of libtorch's engine. A
// small flow takes less time than Python's autograd Function alone.
//
// libtorch's C++ interface changes from release to release: vvae_fast/node.py uses this module with the torch that it
// was built for, and with no other.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

namespace vvae {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
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

// The prefix of a headed flow's operators, which have the C++ backend's kernels alone.
const std::string kHeaded = "headed_";

// What a step computes, shapes.FlowSpec.numbers(), and the operators of the backend that computes it.
struct How {
  int64_t constraint, activation;
  double slope, log_det_eps;
  std::string prefix;  // of the operators' names
  c10::TypedOperatorHandle<Forward> forward;
  c10::TypedOperatorHandle<Backward> backward;
  std::optional<c10::TypedOperatorHandle<BackwardPacked>> backward_packed;  // none of a headed flow
  const How* next;

  bool is(int64_t c, int64_t a, double s, double e, const std::string& p) const {
    const auto equal = [](double x, double y) { return std::memcmp(&x, &y, sizeof x) == 0; };  // NaN is itself
    return constraint == c && activation == a && equal(slope, s) && equal(log_det_eps, e) && prefix == p;
  }
  bool is_headed() const { return !backward_packed; }
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
  const bool headed = prefix == kHeaded;
  const std::string names = headed ? prefix : prefix + "planar_";
  std::optional<c10::TypedOperatorHandle<BackwardPacked>> backward_packed;
  if (!headed) backward_packed = find<BackwardPacked>(names + "backward_packed");
  const How* how = new How{constraint,
                           activation,
                           slope,
                           log_det_eps,
                           prefix,
                           find<Forward>(names + "forward"),
                           find<Backward>(names + "backward"),
                           backward_packed,
                           first};
  first = how;
  return *first;
}

// Views of packed [R, K (2 D + 1)], as shapes.unpack's: u, w [R, K, D] and b [R, K].
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

// dz, du, dw and db for gradients that are differentiated once more: the reference's, in Python. Here and below, those
// of a headed flow are its context, weight and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> differentiable(const Tensor& grad_z, const Tensor& grad_log_det,
                                                          const Tensor& z, const Tensor& u, const Tensor& w,
                                                          const Tensor& b, const How& how) {
  const pybind11::gil_scoped_acquire gil;
  const char* name = how.is_headed() ? "reference_headed_backward" : "reference_backward";
  const auto backward = pybind11::module_::import("vvae_fast.autograd").attr(name);
  const auto numbers = pybind11::make_tuple(how.constraint, how.activation, how.slope, how.log_det_eps);
  return backward(grad_z, grad_log_det, z, u, w, b, numbers).cast<std::tuple<Tensor, Tensor, Tensor, Tensor>>();
}

// What a backward is given beside the gradients of the outputs: the node's inputs, z, u, w, b or z, packed, what the
// forward saved, the pre-activations a [K, R] and in a headed flow some z, and whether any of the parameters needs a
// gradient.
template <size_t N>
struct Saved {
  std::array<Tensor, N> inputs;
  Tensor a;
  bool params;
};

// Whether the gradients are differentiated once more: by a graph of them, or by forward-mode AD of `grads`.
bool are_differentiated(const Tensor& grad_z, const Tensor& grad_log_det) {
  return at::GradMode::is_enabled() || grad_z._fw_grad(0).defined() || grad_log_det._fw_grad(0).defined();
}

// dz, du, dw and db.
variable_list gradients(const How& how, const Tensor& grad_z, const Tensor& grad_log_det, const Saved<4>& saved) {
  const auto& [z, u, w, b] = saved.inputs;
  if (are_differentiated(grad_z, grad_log_det)) {
    const auto [dz, du, dw, db] = differentiable(grad_z, grad_log_det, z, u, w, b, how);
    return {dz, du, dw, db};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto [dz, du, dw, db] = how.backward.call(grad_z, grad_log_det, z, u, w, b, saved.a, how.constraint,
                                                  how.activation, how.slope, how.log_det_eps, saved.params);
  if (!saved.params) return {dz, Tensor(), Tensor(), Tensor()};
  return {dz, du, dw, db};
}

// dz and dpacked.
variable_list gradients(const How& how, const Tensor& grad_z, const Tensor& grad_log_det, const Saved<2>& saved) {
  const auto& [z, packed] = saved.inputs;
  if (are_differentiated(grad_z, grad_log_det)) {
    const auto [u, w, b] = unpack(packed, saved.a.size(0), z.size(1));
    const auto [dz, du, dw, db] = differentiable(grad_z, grad_log_det, z, u, w, b, how);
    return {dz, at::cat({du.flatten(1), dw.flatten(1), db}, 1)};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto [dz, dpacked] = how.backward_packed->call(grad_z, grad_log_det, z, packed, saved.a, how.constraint,
                                                       how.activation, how.slope, how.log_det_eps, saved.params);
  return {dz, saved.params ? dpacked : Tensor()};
}

// `grads`: of z_K and log_det, undefined where the output was not used.
template <size_t N>
variable_list gradients_of_used(const How& how, const variable_list& grads, const Saved<N>& saved) {
  if (!grads[0].defined() && !grads[1].defined()) return variable_list(N);
  const Tensor& z = saved.inputs[0];
  return gradients(how, grads[0].defined() ? grads[0] : at::zeros_like(z),
                   grads[1].defined() ? grads[1] : at::zeros({z.size(0)}, z.options()), saved);
}

// The node of planar_flow and headed_planar_flow (4 inputs) and of packed_planar_flow (2), as PyTorch writes those of
// its own operators: torch::autograd::Function costs a small flow more than its kernels do.
template <size_t N>
class FlowNode : public torch::autograd::Node {
 public:
  FlowNode(const How& how, const std::array<Tensor, N>& inputs, const Tensor& a) : how_(how) {
    for (size_t i = 0; i < N; ++i) inputs_[i] = SavedVariable(inputs[i], false);
    a_ = SavedVariable(a, false);
  }

  std::string name() const override {
    if (how_.is_headed()) return "vvae::HeadedPlanarFlow";
    return N == 4 ? "vvae::PlanarFlow" : "vvae::PackedPlanarFlow";
  }

  variable_list apply(variable_list&& grads) override { return gradients_of_used(how_, grads, unpack_saved()); }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& input : inputs_) input.reset_data();
    a_.reset_data();
  }

  // Under compiled autograd the backward is one function for it, which is not traced.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(name());
    args.collect(reinterpret_cast<uint64_t>(&how_));
    for (const SavedVariable& input : inputs_) args.collect(input, false);
    args.collect(a_, false);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace compiled = torch::dynamo::autograd;
    for (SavedVariable& input : inputs_) swap.before(input);
    swap.before(a_);
    const Saved<N> saved = unpack_saved();
    std::vector<at::IValue> args(saved.inputs.begin(), saved.inputs.end());
    args.insert(args.end(), {saved.a, saved.params, reinterpret_cast<int64_t>(&how_)});
    std::vector<at::TypePtr> types;
    for (const at::IValue& arg : args) types.push_back(arg.isTensor() ? at::TensorType::get() : arg.type());
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string bound = compiler->bind_function(swap.get_py_compiler(), name(), of_arguments, types, true, false);
    const auto edges = compiled::get_input_metadata(next_edges());
    auto result = compiler->call_function(
        swap.get_py_compiler(), "apply_functional", bound, grads, args,
        compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(edges));
    for (SavedVariable& input : inputs_) swap.after(input);
    swap.after(a_);
    return result;
  }

 private:
  static variable_list of_arguments(const variable_list& grads, const std::vector<at::IValue>& args) {
    Saved<N> saved;
    for (size_t i = 0; i < N; ++i) saved.inputs[i] = args[i].toTensor();
    saved.a = args[N].toTensor(), saved.params = args[N + 1].toBool();
    return gradients_of_used(*reinterpret_cast<const How*>(args[N + 2].toInt()), grads, saved);
  }

  Saved<N> unpack_saved() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Saved<N> saved;
    for (size_t i = 0; i < N; ++i) saved.inputs[i] = inputs_[i].unpack();
    saved.a = a_.unpack();
    saved.params = false;
    for (size_t i = 1; i < N; ++i) saved.params |= task_should_compute_output(i);
    return saved;
  }

  const How& how_;
  std::array<SavedVariable, N> inputs_;
  SavedVariable a_;
};

// What a graph holds its nodes by: a std::shared_ptr until torch 2.11, a pointer that counts in the node since.
template <class N, class Owner = decltype(torch::autograd::Edge::function), class... Args>
Owner make_node(const Args&... args) {
  if constexpr (std::is_same_v<Owner, std::shared_ptr<torch::autograd::Node>>)
    return Owner(new N(args...), [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>(args...);
}

using Outputs = std::tuple<Tensor, Tensor>;

template <size_t N>
Outputs run(const std::array<Tensor, N>& inputs, const Tensor& u, const Tensor& w, const Tensor& b, const How& how) {
  bool needs = false;
  if (at::GradMode::is_enabled())
    for (const Tensor& input : inputs) needs |= input.requires_grad();
  const auto [z_K, log_det, a] = run_forward(inputs[0], u, w, b, how, needs);
  if (needs) {
    const auto node = make_node<FlowNode<N>>(how, inputs, a);
    node->set_next_edges(torch::autograd::collect_next_edges(at::TensorList(inputs)));
    torch::autograd::set_history(z_K, node);
    torch::autograd::set_history(log_det, node);
  }
  return {z_K, log_det};
}

Outputs planar_flow(const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b, int64_t constraint,
                    int64_t activation, double slope, double log_det_eps, const std::string& prefix) {
  return run<4>({z, u, w, b}, u, w, b, how_of(constraint, activation, slope, log_det_eps, prefix));
}

Outputs headed_planar_flow(const Tensor& z, const Tensor& context, const Tensor& weight, const Tensor& bias,
                           int64_t constraint, int64_t activation, double slope, double log_det_eps) {
  return planar_flow(z, context, weight, bias, constraint, activation, slope, log_det_eps, kHeaded);
}

Outputs packed_planar_flow(const Tensor& z, const Tensor& packed, int64_t steps, int64_t constraint, int64_t activation,
                           double slope, double log_det_eps, const std::string& prefix) {
  const auto [u, w, b] = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // these views are for the kernels alone
    return unpack(packed, steps, z.size(1));
  }();
  return run<2>({z, packed}, u, w, b, how_of(constraint, activation, slope, log_det_eps, prefix));
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

// shapes.is_ordinary, of a call that nobody observes.
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

// Whether the C++ backend computes a flow with its head, in a call that nobody observes: z [R, D], context [R, F],
// weight [K (2 D + 1), F] and bias [K (2 D + 1)] of one dtype of full precision, on the CPU.
bool is_ordinary_headed(pybind11::handle z_, pybind11::handle context_, pybind11::handle weight_,
                        pybind11::handle bias_) {
  if (is_observed() || at::autocast::is_autocast_enabled(at::kCPU)) return false;
  const Tensor *z = plain(z_), *context = plain(context_), *weight = plain(weight_), *bias = plain(bias_);
  if (!z || !context || !weight || !bias || !is_full_precision(*z) || z->dim() != 2 || z->size(1) == 0) return false;
  for (const Tensor* t : {z, context, weight, bias})
    if (!t->is_cpu() || t->layout() != at::kStrided || t->scalar_type() != z->scalar_type()) return false;
  return context->dim() == 2 && weight->dim() == 2 && bias->dim() == 1 && context->size(0) == z->size(0) &&
         weight->size(1) == context->size(1) && weight->size(0) == bias->size(0) &&
         weight->size(0) % (2 * z->size(1) + 1) == 0;
}

}  // namespace
}  // namespace vvae

PYBIND11_MODULE(_C_node, m) {
  using torch::wrap_pybind_function_no_gil;  // lets exceptions of PyTorch and of Python's hooks pass as they are
  m.doc() = "An ordinary call of the flow, as a node of libtorch's engine.";
  m.def("is_ordinary", &vvae::is_ordinary, "Whether planar_flow takes z, u, w, b.");
  m.def("is_ordinary_packed", &vvae::is_ordinary_packed, "Whether packed_planar_flow takes z, packed, steps, dim.");
  m.def("is_ordinary_headed", &vvae::is_ordinary_headed, "Whether headed_planar_flow takes z, context, weight, bias.");
  m.def("planar_flow", wrap_pybind_function_no_gil(&vvae::planar_flow), "autograd.run of an ordinary call.");
  m.def("packed_planar_flow", wrap_pybind_function_no_gil(&vvae::packed_planar_flow),
        "autograd.run of an ordinary call with packed parameters.");
  m.def("headed_planar_flow", wrap_pybind_function_no_gil(&vvae::headed_planar_flow), "A headed flow of one.");
  m.def("torch_version", [] { return VVAE_FAST_TORCH_VERSION; }, "The torch that this module serves.");
}
