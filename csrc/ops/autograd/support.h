#pragma once

// What the autograd kernels of all ops share.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "../checks.h"

namespace scattermoe {

inline bool has_derivative(const at::Tensor& tensor) {
    return tensor.defined() &&
           ((at::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined());
}
inline bool has_derivative(const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && has_derivative(*tensor);
}

// Whether a derivative with respect to one of the tensors may be asked for, backwards or forwards. Where not, a node of
// the graph would be made for nothing.
template <typename... Tensors>
bool any_has_derivative(const Tensors&... tensors) {
    return (has_derivative(tensors) || ...);
}

// Options::fields ties the members that an op's backward pass needs besides tensors. They are kept as one list: each
// entry of saved_data is a string in a map.
template <typename Options>
void save_options(torch::autograd::AutogradContext* ctx, const Options& options) {
    c10::impl::GenericList values(c10::AnyType::get());
    std::apply([&](const auto&... field) { (values.push_back(c10::IValue(field)), ...); }, Options::fields(options));
    ctx->saved_data["options"] = std::move(values);
}

template <typename Options>
Options load_options(torch::autograd::AutogradContext* ctx) {
    Options options;
    const c10::impl::GenericList values = ctx->saved_data.at("options").toList();
    size_t next = 0;
    std::apply(
        [&](auto&... field) {
            ((field = values.get(next++).template to<std::remove_reference_t<decltype(field)>>()), ...);
        },
        Options::fields(options));
    return options;
}

}  // namespace scattermoe
