#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels {

struct GroupByExpertParams {
    const void* expert_ids = nullptr;  // [S], int64 or int32
    bool ids_are_int64 = true;
    int64_t num_slots = 0;
    int32_t num_experts = 0;
    int32_t* slot_order = nullptr;      // [S]
    int32_t* slot_position = nullptr;   // [S]
    int32_t* expert_offsets = nullptr;  // [E + 1]
    int32_t* workspace = nullptr;       // as many int32 as group_by_expert_workspace says, none for 0
};

int64_t group_by_expert_workspace(int64_t num_slots, int32_t num_experts);

cudaError_t group_by_expert(const GroupByExpertParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
