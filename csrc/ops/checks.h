#pragma once

// Argument checks shared by the ops. Every backend kernel of an op, the meta kernel included, calls the same check
// before it does anything else, so a bad call fails with the same words on every device and while tracing.

#include <ATen/ATen.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string_view>

#include "../kernels/activation.h"

namespace scattermoe {

// Slots and grouped positions are int32: half the index traffic, and 2^31 slots are out of reach of one device.
inline constexpr int64_t kMaxSlots = std::numeric_limits<int32_t>::max();

struct NamedTensor {
    const char* name;
    const at::Tensor& tensor;
};

// A named size, so that errors can say which one: {"weight.size(2)", weight.sym_size(2)}.
struct NamedSize {
    const char* name;
    c10::SymInt value;
};

void check_dim(const char* op, const NamedTensor& arg, int64_t dim);
void check_size(const char* op, const NamedSize& got, const NamedSize& expected);
void check_at_least(const char* op, const NamedSize& got, int64_t minimum);
void check_at_most(const char* op, const NamedSize& got, int64_t maximum);
void check_defined(const char* op, const NamedTensor& arg);
// All on the device of `first`.
void check_same_device(const char* op, const NamedTensor& first, std::initializer_list<NamedTensor> others);
// All of the dtype of `first`, which must be float64, float32, bfloat16 or float16.
void check_same_float_dtype(const char* op, const NamedTensor& first, std::initializer_list<NamedTensor> others);
void check_floating(const char* op, const NamedTensor& arg);
// int32 with `dim` dimensions and no more elements than an int32 can count, as group_by_expert returns index tensors.
void check_index(const char* op, const NamedTensor& arg, int64_t dim);
// Where it is defined: [weight.size(0), weight.size(1)].
void check_bias(const char* op, const NamedTensor& bias, const NamedTensor& weight);

Activation parse_activation(const char* op, std::string_view name);
GluLayout parse_glu_layout(const char* op, std::string_view name);
ActivationParams parse_activation_params(const char* op, std::string_view activation, std::string_view glu_layout,
                                         double alpha, double limit);

inline bool has_value(const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->defined();
}

inline std::optional<at::Tensor> as_optional(const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// The compute dtype of a floating dtype: float64 for itself, float32 for everything else.
inline at::ScalarType compute_dtype(at::ScalarType dtype) {
    return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// What stands in for a gradient that was not asked for: schemas without optional outputs trace everywhere.
inline at::Tensor empty_gradient(const at::Tensor& like) {
    return at::empty({0}, like.options());
}
inline at::Tensor or_empty(const at::Tensor& gradient, const at::Tensor& like) {
    return gradient.defined() ? gradient : empty_gradient(like);
}

}  // namespace scattermoe
