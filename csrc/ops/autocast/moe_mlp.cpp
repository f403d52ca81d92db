#include "../moe_mlp.h"

#include <torch/library.h>

#include "autocast.h"

namespace scattermoe {

namespace {

// The gates keep their dtype: they are multiplied in float32 whatever x is.
template <at::DeviceType kDevice>
at::Tensor moe_mlp_autocast(const at::Tensor& x, const at::Tensor& w_up, const std::optional<at::Tensor>& b_up,
                            const at::Tensor& w_down, const std::optional<at::Tensor>& b_down, const at::Tensor& gates,
                            const at::Tensor& slot_order, const at::Tensor& slot_position,
                            const at::Tensor& expert_offsets, std::string_view activation, std::string_view glu_layout,
                            double alpha, double limit, std::optional<bool> allow_tf32, bool recompute) {
    const AutocastScope autocast(kDevice);
    return moe_mlp(autocast.cast(x), autocast.cast(w_up), autocast.cast(b_up), autocast.cast(w_down),
                   autocast.cast(b_down), gates, slot_order, slot_position, expert_offsets, activation, glu_layout,
                   alpha, limit, allow_tf32, recompute);
}

TORCH_LIBRARY_IMPL(scattermoe, AutocastCPU, m) {
    m.impl("moe_mlp", TORCH_FN(moe_mlp_autocast<at::kCPU>));
}

TORCH_LIBRARY_IMPL(scattermoe, AutocastCUDA, m) {
    m.impl("moe_mlp", TORCH_FN(moe_mlp_autocast<at::kCUDA>));
}

}  // namespace

}  // namespace scattermoe
