#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace scattermoe::cpu {

// out = a b (+ bias), written in place
void matmul(at::Tensor out, const at::Tensor& a, const at::Tensor& b,
            const std::optional<at::Tensor>& bias = std::nullopt);

}  // namespace scattermoe::cpu
