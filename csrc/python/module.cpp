// scattermoe._C: what Python wants to know that is not a tensor operation. Neither PyTorch nor libscattermoe is linked
// here, so that this module loads, and can explain itself, even where they do not fit together.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "explain.h"

namespace py = pybind11;
using namespace py::literals;

namespace scattermoe {

namespace {

py::object none_if_empty(const char* text) {
    return *text ? py::object(py::str(text)) : py::none();
}

py::dict build_info() {
    py::dict info;
    info["version"] = SCATTERMOE_VERSION;
    info["torch"] = SCATTERMOE_TORCH_VERSION;
    info["python"] = PY_VERSION;
    info["compiler"] = SCATTERMOE_COMPILER;
    info["build_type"] = SCATTERMOE_BUILD_TYPE;
    info["flags"] = SCATTERMOE_COMPILE_FLAGS;
    info["openmp"] = static_cast<bool>(SCATTERMOE_OPENMP);
    info["cuda"] = none_if_empty(SCATTERMOE_CUDA_VERSION);
    info["cuda_archs"] = py::str(SCATTERMOE_CUDA_ARCHS).attr("split")();
    return info;
}

// The value that a table of {name, value} has for a name.
template <typename Table>
auto parse(const char* what, const std::string& name, const Table& table) {
    std::string names;
    for (const auto& [known, value] : table) {
        if (known == name) return value;
        names += (names.empty() ? "" : ", ") + std::string(known);
    }
    throw py::value_error(std::string("unknown ") + what + " '" + name + "', expected one of " + names);
}

const std::vector<std::pair<std::string, kernels::DType>> kDTypeNames{{"bfloat16", kernels::DType::kBFloat16},
                                                                      {"float16", kernels::DType::kFloat16},
                                                                      {"float32", kernels::DType::kFloat32},
                                                                      {"float64", kernels::DType::kFloat64}};

void check_at_least(const char* name, int64_t value, int64_t minimum) {
    if (value >= minimum) return;
    throw py::value_error(std::string("expected ") + name + " >= " + std::to_string(minimum) + ", got " +
                          std::to_string(value));
}

py::list explain_call(const std::string& op, const std::string& dtype, int64_t num_tokens, int64_t num_experts,
                      int64_t top_k, int64_t hidden_size, int64_t intermediate_size, bool backward,
                      std::optional<int> arch, bool hopper, bool allow_tf32, bool bias, bool transposed,
                      bool grouped_in, bool grouped_out, const std::string& activation, const std::string& glu_layout) {
    check_at_least("num_tokens", num_tokens, 0);
    check_at_least("num_experts", num_experts, 1);
    check_at_least("top_k", top_k, 1);
    check_at_least("hidden_size", hidden_size, 0);
    check_at_least("intermediate_size", intermediate_size, 0);
    if (arch.has_value()) check_at_least("arch", *arch, 80);
    ExplainQuery query;
    query.op = op;
    query.backward = backward;
    query.arch = arch;
    query.hopper = hopper;
    query.allow_tf32 = allow_tf32;
    query.dtype = parse("dtype", dtype, kDTypeNames);
    query.num_tokens = num_tokens;
    query.num_experts = num_experts;
    query.top_k = top_k;
    query.hidden_size = hidden_size;
    query.intermediate_size = intermediate_size;
    query.bias = bias;
    query.transposed = transposed;
    query.grouped_in = grouped_in;
    query.grouped_out = grouped_out;
    query.activation = parse("activation", activation, kActivationNames);
    query.glu_layout = parse("glu_layout", glu_layout, kGluLayoutNames);
    py::list launches;
    for (const Launch& launch : explain(query)) {
        launches.append(py::dict("step"_a = launch.step, "kernel"_a = launch.kernel,
                                 "tile"_a = launch.tile ? py::object(py::tuple(py::cast(*launch.tile))) : py::none(),
                                 "stages"_a = launch.stages, "why"_a = launch.why));
    }
    return launches;
}

}  // namespace

}  // namespace scattermoe

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build information of the scattermoe library, and which kernels an operator launches.";
    m.def(
        "build_info", &scattermoe::build_info,
        "What the library was built from and how: version, torch, python, compiler, build_type, flags, openmp (False: "
        "the CPU kernels are single-threaded), cuda (None for a CPU build), cuda_archs.");
    m.def("explain", &scattermoe::explain_call, "op"_a, py::kw_only(), "dtype"_a, "num_tokens"_a, "num_experts"_a,
          "top_k"_a = 1, "hidden_size"_a = 0, "intermediate_size"_a = 0, "backward"_a = false, "arch"_a = py::none(),
          "hopper"_a = true, "allow_tf32"_a = false, "bias"_a = false, "transposed"_a = false, "grouped_in"_a = false,
          "grouped_out"_a = false, "activation"_a = "swiglu", "glu_layout"_a = "gate_up",
          R"(Which kernels an operator launches, in their order, and why; scattermoe.explain asks it about a device.

Args:
    op, num_tokens, num_experts, top_k, hidden_size, intermediate_size, backward, bias, transposed, grouped_in,
        grouped_out, activation, glu_layout: as in scattermoe.explain.
    dtype: "bfloat16", "float16", "float32" or "float64".
    arch: architecture of the compiled code, such as 80 or 90; None for the CPU.
    hopper: with arch 90, whether the kernels for it are there and wanted.
    allow_tf32: whether float32 operands may be rounded to TF32.

Returns:
    A list of dicts of step, kernel, tile (m, n, k of a stage; None where there is none), stages and why.

Raises:
    ValueError: An unknown name, an impossible size, or the backward of an op that has none.

Example:
    >>> sizes = {"num_tokens": 8192, "num_experts": 8, "top_k": 2, "hidden_size": 4096, "intermediate_size": 14336}
    >>> launches = scattermoe._C.explain("moe_mlp", dtype="bfloat16", arch=80, **sizes)
    >>> [launch["kernel"] for launch in launches]
    ['sm80::grouped_gemm_kernel', 'activation_forward_kernel', 'sm80::grouped_gemm_kernel', 'combine_kernel']
)");
}
