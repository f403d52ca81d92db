#include "../parallel_linear.h"

#include <torch/library.h>

#include "autocast.h"

namespace scattermoe {

namespace {

template <at::DeviceType kDevice>
at::Tensor parallel_linear_autocast(const at::Tensor& x, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& slot_order,
                                    const at::Tensor& expert_offsets, c10::SymInt top_k, bool grouped_in,
                                    bool grouped_out, std::optional<bool> allow_tf32) {
    const AutocastScope autocast(kDevice);
    return parallel_linear(autocast.cast(x), autocast.cast(weight), autocast.cast(bias), slot_order, expert_offsets,
                           std::move(top_k), grouped_in, grouped_out, allow_tf32);
}

TORCH_LIBRARY_IMPL(scattermoe, AutocastCPU, m) {
    m.impl("parallel_linear", TORCH_FN(parallel_linear_autocast<at::kCPU>));
}

TORCH_LIBRARY_IMPL(scattermoe, AutocastCUDA, m) {
    m.impl("parallel_linear", TORCH_FN(parallel_linear_autocast<at::kCUDA>));
}

}  // namespace

}  // namespace scattermoe
