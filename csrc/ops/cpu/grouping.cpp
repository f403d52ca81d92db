#include "grouping.h"

#include <algorithm>

namespace scattermoe::cpu {

Grouping::Grouping(const char* op, const at::Tensor& slot_order, const at::Tensor& expert_offsets)
    : slot_order_(slot_order.contiguous()), expert_offsets_(expert_offsets.contiguous()) {
    const int32_t* offsets = expert_offsets_.const_data_ptr<int32_t>();
    TORCH_CHECK_INDEX(offsets[0] == 0, "scattermoe::", op, ": expected expert_offsets[0] == 0, got ", offsets[0]);
    TORCH_CHECK_INDEX(std::is_sorted(offsets, offsets + num_experts() + 1), "scattermoe::", op,
                      ": expected expert_offsets in ascending order");
    TORCH_CHECK_INDEX(num_rows() <= num_slots(), "scattermoe::", op,
                      ": expected expert_offsets[-1] <= slot_order.size(0), got ", num_rows(), " and ", num_slots());
    const int32_t* order = slots(0);
    for (int64_t i = 0; i < num_slots(); ++i) {
        TORCH_CHECK_INDEX(order[i] >= 0 && order[i] < num_slots(), "scattermoe::", op, ": expected slot_order[", i,
                          "] in [0, ", num_slots(), "), got ", order[i]);
    }
}

at::Tensor checked_slot_position(const char* op, const at::Tensor& slot_position) {
    at::Tensor contiguous = slot_position.contiguous();
    const int32_t* positions = contiguous.const_data_ptr<int32_t>();
    const int64_t num_slots = contiguous.numel();
    for (int64_t i = 0; i < num_slots; ++i) {
        TORCH_CHECK_INDEX(positions[i] >= -1 && positions[i] < num_slots, "scattermoe::", op,
                          ": expected slot_position in [-1, ", num_slots, "), got ", positions[i], " at slot ", i);
    }
    return contiguous;
}

}  // namespace scattermoe::cpu
