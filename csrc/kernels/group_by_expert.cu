// A stable counting sort of slots by expert, without atomics that could reorder equal keys.
//
// Slots are cut into at most kMaxBlocks contiguous chunks, one for each thread block, and each chunk into one
// contiguous segment for each warp. A bucket is an expert, or (the last one) the sentinels.
//   1. count: how many slots of each bucket every chunk has
//   2. prefix: for each bucket, the counts of the chunks before (in place) and the total
//   3. rank: the place of a slot = start of its bucket + slots of the bucket in chunks before, in segments before, in
//      steps of 32 slots before, and in lanes before
// Few slots need the last kernel alone: one block counts for itself.

#include "group_by_expert.h"

#include <algorithm>

#include "dependent_launch.h"
#include "select.h"
#include "types.h"
#include "vector.h"

namespace scattermoe::kernels {

namespace {

constexpr int kMaxBlocks = 128;
constexpr int kMaxWarps = 16;
// Counters of a block in shared memory: what every GPU from Ampere on grants, with room for the scan.
constexpr int kSharedBudget = 96 * 1024;

constexpr int kPrefixBuckets = 32;   // buckets of one block of the prefix kernel, adjacent in memory
constexpr int kPrefixSegments = 32;  // threads that share the chunks of one bucket
constexpr int kChunksPerSegment = kMaxBlocks / kPrefixSegments;
static_assert(kMaxBlocks % kPrefixSegments == 0);

struct Plan {
    int blocks;
    int warps;             // of one block
    int64_t chunk;         // slots of one block
    bool shared_counters;  // else in the workspace: more experts than shared memory has room for
};

Plan make_plan(int64_t num_slots, int32_t num_experts) {
    const int64_t bytes = (int64_t{num_experts} + 1) * sizeof(int32_t);
    int warps = kMaxWarps;
    while (warps > 1 && warps * bytes > kSharedBudget)
        warps /= 2;
    const bool shared = warps * bytes <= kSharedBudget;
    if (!shared) warps = kMaxWarps / 2;
    // A chunk is at least four steps of every warp.
    const int64_t wanted = num_slots <= kSingleBlockSlots ? 1 : ceil_div(num_slots, int64_t{warps} * kWarpSize * 4);
    const int blocks = static_cast<int>(std::min<int64_t>(wanted, kMaxBlocks));
    return {blocks, warps, round_up(ceil_div(num_slots, blocks), int64_t{warps} * kWarpSize), shared};
}

// The bucket of a slot; `buckets`, which is none, past the end.
template <typename Id>
__device__ __forceinline__ int bucket_of(const Id* ids, int64_t slot, int64_t end, int num_experts) {
    if (slot >= end) return num_experts + 1;
    const Id id = ids[slot];
    return id >= 0 && id < num_experts ? static_cast<int>(id) : num_experts;
}

// Lanes of the warp with the same bucket as this one.
struct Peers {
    unsigned mask;
    __device__ __forceinline__ explicit Peers(int bucket) : mask(__match_any_sync(kFullWarp, bucket)) {}
    __device__ __forceinline__ int count() const { return __popc(mask); }
    __device__ __forceinline__ int rank(int lane) const { return __popc(mask & ((1u << lane) - 1)); }
    __device__ __forceinline__ int leader() const { return __ffs(mask) - 1; }
};

// counts[chunk][bucket]
template <typename Id>
__global__ void count_kernel(const Id* ids, int64_t num_slots, int64_t chunk, int num_experts, bool shared_counters,
                             int32_t* counts) {
    extern __shared__ int32_t shared_counts[];
    begin_dependent();
    const int buckets = num_experts + 1;
    int32_t* const out = counts + int64_t{blockIdx.x} * buckets;
    int32_t* const local = shared_counters ? shared_counts : out;
    for (int b = threadIdx.x; b < buckets; b += blockDim.x)
        local[b] = 0;
    __syncthreads();

    const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, num_slots);
    const int lane = threadIdx.x % kWarpSize;
    // Whole warps stay in the loop together: chunk is a multiple of the block.
    for (int64_t slot = begin + threadIdx.x; slot < begin + chunk; slot += blockDim.x) {
        const int bucket = bucket_of(ids, slot, end, num_experts);
        const Peers peers(bucket);
        // One addition for each bucket in the warp, so that one expert taking all does not serialise the lanes.
        if (bucket < buckets && lane == peers.leader()) atomicAdd(local + bucket, peers.count());
    }
    if (!shared_counters) return;
    __syncthreads();
    for (int b = threadIdx.x; b < buckets; b += blockDim.x)
        out[b] = local[b];
}

// counts[chunk][bucket] becomes the sum over the chunks before; totals[bucket] the sum over all.
__global__ void prefix_kernel(int32_t* counts, int chunks, int buckets, int32_t* totals) {
    __shared__ int32_t sums[kPrefixSegments][kPrefixBuckets + 1];
    begin_dependent();
    const int bucket = blockIdx.x * kPrefixBuckets + threadIdx.x;
    const int first = threadIdx.y * kChunksPerSegment;
    int32_t values[kChunksPerSegment];
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kChunksPerSegment; ++i) {
        const bool inside = bucket < buckets && first + i < chunks;
        values[i] = inside ? counts[int64_t{first + i} * buckets + bucket] : 0;
        sum += values[i];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    int32_t before = 0, total = 0;
    for (int s = 0; s < kPrefixSegments; ++s) {
        const int32_t value = sums[s][threadIdx.x];
        before += s < threadIdx.y ? value : 0;
        total += value;
    }
    if (bucket >= buckets) return;
#pragma unroll
    for (int i = 0; i < kChunksPerSegment; ++i) {
        if (first + i < chunks) counts[int64_t{first + i} * buckets + bucket] = before;
        before += values[i];
    }
    if (threadIdx.y == 0) totals[bucket] = total;
}

// The sum over the threads before this one; `total` the sum over the block. Shared memory is free again on return.
__device__ __forceinline__ int32_t block_exclusive_sum(int32_t value, int32_t& total) {
    __shared__ int32_t warp_totals[kMaxWarps];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    int32_t inclusive = value;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int32_t other = __shfl_up_sync(kFullWarp, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    if (lane == kWarpSize - 1) warp_totals[warp] = inclusive;
    __syncthreads();
    int32_t before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        before += w < warp ? warp_totals[w] : 0;
        total += warp_totals[w];
    }
    __syncthreads();
    return before + inclusive - value;
}

template <typename Id>
__global__ void rank_kernel(const Id* ids, int64_t num_slots, int64_t chunk, int num_experts, const int32_t* prefixes,
                            const int32_t* totals, int32_t* global_counters, int32_t* slot_order,
                            int32_t* slot_position, int32_t* expert_offsets) {
    extern __shared__ int32_t shared_counters[];
    begin_dependent();
    const int buckets = num_experts + 1;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    const bool alone = prefixes == nullptr;
    // counters[warp][bucket]: first how many, then where the next one goes.
    int32_t* const counters =
        global_counters == nullptr ? shared_counters : global_counters + int64_t{blockIdx.x} * warps * buckets;
    int32_t* const mine = counters + int64_t{warp} * buckets;
    for (int b = lane; b < buckets; b += kWarpSize)
        mine[b] = 0;
    __syncwarp();

    const int64_t segment = chunk / warps;
    const int64_t begin = blockIdx.x * chunk + warp * segment, end = min(begin + segment, num_slots);
    for (int64_t base = begin; base < end; base += kWarpSize) {
        const int bucket = bucket_of(ids, base + lane, end, num_experts);
        const Peers peers(bucket);
        if (bucket < buckets && lane == peers.leader()) mine[bucket] += peers.count();
        __syncwarp();
    }
    __syncthreads();

    int32_t start_of_round = 0;
    for (int first = 0; first < buckets; first += blockDim.x) {
        const int bucket = first + threadIdx.x;
        int32_t total = 0;
        if (bucket < buckets) {
            if (alone) {
                for (int w = 0; w < warps; ++w)
                    total += counters[int64_t{w} * buckets + bucket];
            } else {
                total = totals[bucket];
            }
        }
        int32_t round_total;
        const int32_t start = start_of_round + block_exclusive_sum(total, round_total);
        start_of_round += round_total;
        if (bucket >= buckets) continue;
        // The sentinels' bucket starts where the last expert ends: offsets[E].
        if (blockIdx.x == 0) expert_offsets[bucket] = start;
        int32_t next = start + (alone ? 0 : prefixes[int64_t{blockIdx.x} * buckets + bucket]);
        for (int w = 0; w < warps; ++w) {
            int32_t& counter = counters[int64_t{w} * buckets + bucket];
            const int32_t count = counter;
            counter = next;
            next += count;
        }
    }
    __syncthreads();

    for (int64_t base = begin; base < end; base += kWarpSize) {
        const int64_t slot = base + lane;
        const int bucket = bucket_of(ids, slot, end, num_experts);
        const Peers peers(bucket);
        int32_t first = 0;
        if (bucket < buckets && lane == peers.leader()) {
            first = mine[bucket];
            mine[bucket] = first + peers.count();
        }
        first = __shfl_sync(kFullWarp, first, peers.leader());
        if (bucket < buckets) {
            const int32_t position = first + peers.rank(lane);
            slot_order[position] = static_cast<int32_t>(slot);
            slot_position[slot] = bucket == num_experts ? -1 : position;
        }
        __syncwarp();
    }
}

template <typename Id>
cudaError_t launch(const GroupByExpertParams& p, const Plan& plan, cudaStream_t stream) {
    const Id* const ids = static_cast<const Id*>(p.expert_ids);
    const int buckets = p.num_experts + 1;
    const int threads = plan.warps * kWarpSize;
    int32_t* const counts = p.workspace;                              // [blocks][buckets]
    int32_t* const totals = counts + int64_t{plan.blocks} * buckets;  // [buckets]
    int32_t* const counters = totals + buckets;                       // [blocks][warps][buckets]
    const bool alone = plan.blocks == 1;
    if (!alone) {
        const size_t shared = plan.shared_counters ? buckets * sizeof(int32_t) : 0;
        if (shared > 48 * 1024) {
            const cudaError_t error =
                cudaFuncSetAttribute(count_kernel<Id>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBudget);
            if (error != cudaSuccess) return error;
        }
        cudaError_t error = launch_dependent(count_kernel<Id>, plan.blocks, threads, shared, stream, ids, p.num_slots,
                                             plan.chunk, p.num_experts, plan.shared_counters, counts);
        if (error != cudaSuccess) return error;
        error =
            launch_dependent(prefix_kernel, static_cast<unsigned>(ceil_div(buckets, kPrefixBuckets)),
                             dim3(kPrefixBuckets, kPrefixSegments), 0, stream, counts, plan.blocks, buckets, totals);
        if (error != cudaSuccess) return error;
    }
    const size_t shared =
        plan.shared_counters ? size_t{static_cast<unsigned>(plan.warps)} * buckets * sizeof(int32_t) : 0;
    if (shared > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(rank_kernel<Id>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBudget);
        if (error != cudaSuccess) return error;
    }
    return launch_dependent(rank_kernel<Id>, plan.blocks, threads, shared, stream, ids, p.num_slots, plan.chunk,
                            p.num_experts, alone ? nullptr : counts, totals, plan.shared_counters ? nullptr : counters,
                            p.slot_order, p.slot_position, p.expert_offsets);
}

}  // namespace

int64_t group_by_expert_workspace(int64_t num_slots, int32_t num_experts) {
    if (num_slots == 0) return 0;
    const Plan plan = make_plan(num_slots, num_experts);
    if (plan.blocks == 1 && plan.shared_counters) return 0;
    const int64_t buckets = int64_t{num_experts} + 1;
    return (plan.blocks + 1) * buckets + (plan.shared_counters ? 0 : int64_t{plan.blocks} * plan.warps * buckets);
}

cudaError_t group_by_expert(const GroupByExpertParams& params, cudaStream_t stream) {
    if (params.num_slots == 0) {
        return cudaMemsetAsync(params.expert_offsets, 0, (size_t{1} + params.num_experts) * sizeof(int32_t), stream);
    }
    const Plan plan = make_plan(params.num_slots, params.num_experts);
    return params.ids_are_int64 ? launch<int64_t>(params, plan, stream) : launch<int32_t>(params, plan, stream);
}

}  // namespace scattermoe::kernels
