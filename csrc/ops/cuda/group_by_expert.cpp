#include "../group_by_expert.h"

#include <torch/library.h>

#include "../../kernels/group_by_expert.h"
#include "support.h"

namespace scattermoe {

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_by_expert_cuda(const at::Tensor& expert_ids,
                                                                    c10::SymInt num_experts) {
    check_group_by_expert(expert_ids, num_experts);
    const c10::cuda::CUDAGuard guard(expert_ids.device());
    const int64_t experts = num_experts.expect_int();
    // Narrower and unsigned dtypes are rare and small: int64 holds them, and a uint64 beyond it turns negative, a
    // sentinel.
    const at::Tensor ids =
        (expert_ids.scalar_type() == at::kInt ? expert_ids : cuda::to_dtype(expert_ids, at::kLong)).contiguous();
    const auto options = expert_ids.options().dtype(at::kInt);
    at::Tensor slot_order = at::empty({ids.numel()}, options);
    at::Tensor slot_position = at::empty(expert_ids.sizes(), options);
    at::Tensor expert_offsets = at::empty({experts + 1}, options);

    kernels::GroupByExpertParams p;
    p.expert_ids = ids.const_data_ptr();
    p.ids_are_int64 = ids.scalar_type() == at::kLong;
    p.num_slots = ids.numel();
    p.num_experts = cuda::size_32("group_by_expert", "num_experts", experts);
    p.slot_order = slot_order.mutable_data_ptr<int32_t>();
    p.slot_position = slot_position.mutable_data_ptr<int32_t>();
    p.expert_offsets = expert_offsets.mutable_data_ptr<int32_t>();
    at::Tensor workspace;
    if (const int64_t size = kernels::group_by_expert_workspace(p.num_slots, p.num_experts); size > 0) {
        workspace = at::empty({size}, options);
        p.workspace = workspace.mutable_data_ptr<int32_t>();
    }
    cuda::check_launch("group_by_expert", kernels::group_by_expert(p, cuda::current_stream()),
                       {{"expert_ids", expert_ids}, {"expert_offsets", expert_offsets}});
    return {slot_order, slot_position, expert_offsets};
}

TORCH_LIBRARY_IMPL(scattermoe, CUDA, m) {
    m.impl("group_by_expert", TORCH_FN(group_by_expert_cuda));
}

}  // namespace

}  // namespace scattermoe
