#include "checks.h"

#include <c10/util/Exception.h>

#include <string>

namespace scattermoe {

void check_defined(const char* op, const NamedTensor& arg) {
    TORCH_CHECK_VALUE(arg.tensor.defined(), "scattermoe::", op, ": expected ", arg.name, " to be a tensor, got None");
}

void check_dim(const char* op, const NamedTensor& arg, int64_t dim) {
    check_defined(op, arg);
    TORCH_CHECK_VALUE(arg.tensor.dim() == dim, "scattermoe::", op, ": expected ", arg.name, ".dim() == ", dim, ", got ",
                      arg.tensor.dim(), " (shape ", arg.tensor.sym_sizes(), ")");
}

void check_size(const char* op, const NamedSize& got, const NamedSize& expected) {
    // expect_true rather than a plain comparison: unbacked sizes become runtime assertions while tracing.
    TORCH_CHECK_VALUE(got.value.sym_eq(expected.value).expect_true(__FILE__, __LINE__), "scattermoe::", op,
                      ": expected ", got.name, " == ", expected.name, ", got ", got.value, " and ", expected.value);
}

void check_at_least(const char* op, const NamedSize& got, int64_t minimum) {
    TORCH_CHECK_VALUE(got.value.sym_ge(minimum).expect_true(__FILE__, __LINE__), "scattermoe::", op, ": expected ",
                      got.name, " >= ", minimum, ", got ", got.value);
}

void check_at_most(const char* op, const NamedSize& got, int64_t maximum) {
    // A symbolic size is left alone: a guard here would put a bound on every exported program's dynamic dimensions, and
    // the backend kernel checks the size again when it has a value.
    const std::optional<int64_t> value = got.value.maybe_as_int();
    TORCH_CHECK_VALUE(!value.has_value() || *value <= maximum, "scattermoe::", op, ": expected ", got.name,
                      " <= ", maximum, ", got ", got.value);
}

void check_same_device(const char* op, const NamedTensor& first, std::initializer_list<NamedTensor> others) {
    for (const NamedTensor& other : others) {
        if (!other.tensor.defined()) continue;
        TORCH_CHECK_VALUE(other.tensor.device() == first.tensor.device(), "scattermoe::", op, ": expected ", other.name,
                          " on the device of ", first.name, ", got ", other.tensor.device(), " and ",
                          first.tensor.device());
    }
}

void check_floating(const char* op, const NamedTensor& arg) {
    const at::ScalarType dtype = arg.tensor.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                     "scattermoe::", op, ": expected ", arg.name, " to be float64, float32, bfloat16 or float16, got ",
                     dtype);
}

void check_same_float_dtype(const char* op, const NamedTensor& first, std::initializer_list<NamedTensor> others) {
    check_floating(op, first);
    for (const NamedTensor& other : others) {
        if (!other.tensor.defined()) continue;
        TORCH_CHECK_TYPE(other.tensor.scalar_type() == first.tensor.scalar_type(), "scattermoe::", op, ": expected ",
                         other.name, " to have the dtype of ", first.name, ", got ", other.tensor.scalar_type(),
                         " and ", first.tensor.scalar_type());
    }
}

void check_index(const char* op, const NamedTensor& arg, int64_t dim) {
    check_dim(op, arg, dim);
    TORCH_CHECK_TYPE(arg.tensor.scalar_type() == at::kInt, "scattermoe::", op, ": expected ", arg.name,
                     " to be int32 as group_by_expert returns it, got ", arg.tensor.scalar_type());
    const std::optional<int64_t> numel = arg.tensor.sym_numel().maybe_as_int();
    TORCH_CHECK_VALUE(!numel.has_value() || *numel <= kMaxSlots, "scattermoe::", op, ": expected ", arg.name,
                      ".numel() <= ", kMaxSlots, ", got ", *numel);
}

void check_bias(const char* op, const NamedTensor& bias, const NamedTensor& weight) {
    if (!bias.tensor.defined()) return;
    check_dim(op, bias, 2);
    for (const int64_t dim : {0, 1}) {
        const c10::SymInt got = bias.tensor.sym_size(dim), expected = weight.tensor.sym_size(dim);
        TORCH_CHECK_VALUE(got.sym_eq(expected).expect_true(__FILE__, __LINE__), "scattermoe::", op, ": expected ",
                          bias.name, ".size(", dim, ") == ", weight.name, ".size(", dim, "), got ", got, " and ",
                          expected);
    }
}

namespace {

template <typename Table>
std::string known_names(const Table& table) {
    std::string names;
    for (const auto& entry : table) {
        if (!names.empty()) names += ", ";
        names += entry.name;
    }
    return names;
}

}  // namespace

Activation parse_activation(const char* op, std::string_view name) {
    for (const ActivationName& entry : kActivationNames) {
        if (entry.name == name) return entry.activation;
    }
    TORCH_CHECK_VALUE(false, "scattermoe::", op, ": unknown activation '", name, "', expected one of ",
                      known_names(kActivationNames));
}

GluLayout parse_glu_layout(const char* op, std::string_view name) {
    for (const GluLayoutName& entry : kGluLayoutNames) {
        if (entry.name == name) return entry.layout;
    }
    TORCH_CHECK_VALUE(false, "scattermoe::", op, ": unknown glu_layout '", name, "', expected one of ",
                      known_names(kGluLayoutNames));
}

ActivationParams parse_activation_params(const char* op, std::string_view activation, std::string_view glu_layout,
                                         double alpha, double limit) {
    const ActivationParams params{parse_activation(op, activation), parse_glu_layout(op, glu_layout), alpha, limit};
    TORCH_CHECK_VALUE(params.activation != Activation::kSwigluClamped || limit >= 0, "scattermoe::", op,
                      ": expected limit >= 0, got ", limit);
    return params;
}

}  // namespace scattermoe
