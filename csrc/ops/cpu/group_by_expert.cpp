#include "../group_by_expert.h"

#include <torch/library.h>

#include <vector>

namespace scattermoe {

namespace {

// A stable counting sort in two passes over the slots: count, then place.
template <typename Id>
void counting_sort(const Id* expert_ids, int64_t num_slots, int64_t num_experts, int32_t* slot_order,
                   int32_t* slot_position, int32_t* expert_offsets) {
    const auto is_sentinel = [&](Id id) { return id < 0 || static_cast<int64_t>(id) >= num_experts; };
    std::fill(expert_offsets, expert_offsets + num_experts + 1, 0);
    for (int64_t slot = 0; slot < num_slots; ++slot) {
        if (!is_sentinel(expert_ids[slot])) ++expert_offsets[expert_ids[slot] + 1];
    }
    for (int64_t expert = 0; expert < num_experts; ++expert)
        expert_offsets[expert + 1] += expert_offsets[expert];

    std::vector<int32_t> next(expert_offsets, expert_offsets + num_experts);
    int32_t next_sentinel = expert_offsets[num_experts];
    for (int64_t slot = 0; slot < num_slots; ++slot) {
        const bool sentinel = is_sentinel(expert_ids[slot]);
        const int32_t position = sentinel ? next_sentinel++ : next[expert_ids[slot]]++;
        slot_order[position] = static_cast<int32_t>(slot);
        slot_position[slot] = sentinel ? -1 : position;
    }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_by_expert_cpu(const at::Tensor& expert_ids,
                                                                   c10::SymInt num_experts) {
    check_group_by_expert(expert_ids, num_experts);
    const int64_t experts = num_experts.expect_int();
    // Narrower and unsigned dtypes are rare and small: int64 holds them, and a uint64 beyond it turns negative, a
    // sentinel.
    const at::Tensor ids = (expert_ids.scalar_type() == at::kInt ? expert_ids : expert_ids.to(at::kLong)).contiguous();
    const auto options = expert_ids.options().dtype(at::kInt);
    at::Tensor slot_order = at::empty({ids.numel()}, options);
    at::Tensor slot_position = at::empty(expert_ids.sizes(), options);
    at::Tensor expert_offsets = at::empty({experts + 1}, options);
    const auto sort = [&](const auto* data) {
        counting_sort(data, ids.numel(), experts, slot_order.mutable_data_ptr<int32_t>(),
                      slot_position.mutable_data_ptr<int32_t>(), expert_offsets.mutable_data_ptr<int32_t>());
    };
    if (ids.scalar_type() == at::kInt) {
        sort(ids.const_data_ptr<int32_t>());
    } else {
        sort(ids.const_data_ptr<int64_t>());
    }
    return {slot_order, slot_position, expert_offsets};
}

TORCH_LIBRARY_IMPL(scattermoe, CPU, m) {
    m.impl("group_by_expert", TORCH_FN(group_by_expert_cpu));
}

}  // namespace

}  // namespace scattermoe
