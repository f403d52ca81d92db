// Scores, selection and gates of a token in one pass over its logits: one warp for each token, its scores in shared
// memory.

#include "topk_gating.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "dispatch.h"
#include "vector.h"

namespace scattermoe::kernels {

namespace {

constexpr int kMaxWarps = 8;
constexpr int kSharedBudget = 96 * 1024;
constexpr int kDefaultShared = 48 * 1024;

// Scores as unsigned integers in the same order: NaN above every number as in torch.topk, -0 equal to 0, and zero,
// which no score maps to, for what cannot be chosen (any more).
template <typename Compute>
using Key = std::conditional_t<std::is_same_v<Compute, double>, unsigned long long, unsigned>;

__device__ __forceinline__ unsigned to_bits(float value) {
    return __float_as_uint(value);
}
__device__ __forceinline__ unsigned long long to_bits(double value) {
    return static_cast<unsigned long long>(__double_as_longlong(value));
}
__device__ __forceinline__ float from_bits(unsigned bits) {
    return __uint_as_float(bits);
}
__device__ __forceinline__ double from_bits(unsigned long long bits) {
    return __longlong_as_double(static_cast<long long>(bits));
}

template <typename Compute>
inline constexpr Key<Compute> kSignBit = Key<Compute>(1) << (sizeof(Compute) * 8 - 1);

template <typename Compute>
__device__ __forceinline__ Key<Compute> to_key(Compute value) {
    if (value != value) return ~Key<Compute>(0);
    const Key<Compute> bits = to_bits(value + Compute(0));
    return bits & kSignBit<Compute> ? ~bits : bits | kSignBit<Compute>;
}

template <typename Compute>
__device__ __forceinline__ Compute from_key(Key<Compute> key) {
    return from_bits(key & kSignBit<Compute> ? key ^ kSignBit<Compute> : ~key);
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
    return __reduce_max_sync(kFullWarp, value);
}
__device__ __forceinline__ unsigned long long warp_max(unsigned long long value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        value = max(value, __shfl_xor_sync(kFullWarp, value, offset));
    }
    return value;
}

// Takes the greatest keys of an array one after the other, equal ones by index. Each lane remembers the best of the
// elements it looks after, so that only the lane whose best was taken has to look again.
template <typename Key>
class Selector {
  public:
    __device__ __forceinline__ Selector(Key* keys, int size) : keys_(keys), size_(size) {
        __syncwarp();
        find_best();
    }

    // The index of the greatest key, whose key becomes zero.
    __device__ __forceinline__ int take() {
        const Key greatest = warp_max(best_);
        const unsigned candidate = best_ == greatest ? static_cast<unsigned>(best_index_) : ~0u;
        const int index = static_cast<int>(__reduce_min_sync(kFullWarp, candidate));
        if (index % kWarpSize == static_cast<int>(threadIdx.x)) {
            keys_[index] = 0;
            find_best();
        }
        __syncwarp();
        return index;
    }

  private:
    __device__ __forceinline__ void find_best() {
        best_ = 0;
        best_index_ = threadIdx.x;
        for (int i = threadIdx.x; i < size_; i += kWarpSize) {
            if (keys_[i] > best_) {
                best_ = keys_[i];
                best_index_ = i;
            }
        }
    }

    Key* keys_;
    int size_;
    Key best_;
    int best_index_;
};

// scores[e] of the warp's token; a NaN logit makes a softmax row NaN and a sigmoid score NaN.
template <typename T, typename Compute>
__device__ __forceinline__ void score_row(Scoring scoring, const T* logits, int num_experts, Compute* scores) {
    const int lane = threadIdx.x;
    if (scoring == Scoring::kSigmoid) {
        for (int e = lane; e < num_experts; e += kWarpSize) {
            scores[e] = Compute(1) / (Compute(1) + exp(-to_compute(logits[e])));
        }
        __syncwarp();
        return;
    }
    Key<Compute> greatest = 0;
    for (int e = lane; e < num_experts; e += kWarpSize) {
        scores[e] = to_compute(logits[e]);
        // NaN does not become the maximum, but the sum.
        if (scores[e] == scores[e]) greatest = max(greatest, to_key(scores[e]));
    }
    greatest = warp_max(greatest);
    const Compute maximum = greatest == 0 ? Compute(0) : from_key<Compute>(greatest);
    Compute sum = 0;
    for (int e = lane; e < num_experts; e += kWarpSize) {
        scores[e] = exp(scores[e] - maximum);
        sum += scores[e];
    }
    sum = warp_sum(sum);
    for (int e = lane; e < num_experts; e += kWarpSize)
        scores[e] /= sum;
    __syncwarp();
}

// Sets the keys of the experts outside the best groups to zero.
template <typename Compute>
__device__ __forceinline__ void keep_best_groups(const TopkGatingParams& p, Key<Compute>* keys,
                                                 Key<Compute>* group_keys) {
    const int lane = threadIdx.x, group_size = p.num_experts / p.num_groups;
    for (int group = lane; group < p.num_groups; group += kWarpSize) {
        Key<Compute> first = 0, second = 0;
        for (int e = group * group_size; e < (group + 1) * group_size; ++e) {
            second = max(second, min(first, keys[e]));
            first = max(first, keys[e]);
        }
        Compute score = from_key<Compute>(first);
        if (p.bias != nullptr && group_size > 1) score += from_key<Compute>(second);
        group_keys[group] = to_key(score);
    }
    Selector<Key<Compute>> best(group_keys, p.num_groups);
    for (int i = 0; i < p.top_groups; ++i)
        best.take();
    // What is left are the groups that lost.
    for (int e = lane; e < p.num_experts; e += kWarpSize) {
        if (group_keys[e / group_size] != 0) keys[e] = 0;
    }
}

// Shared memory of one warp: scores [E], keys [E], keys of the groups, and the chosen experts.
template <typename Compute>
int64_t shared_bytes(const TopkGatingParams& p) {
    const int64_t words = int64_t{2} * p.num_experts + p.num_groups;
    return round_up(words * sizeof(Compute) + p.k * sizeof(int32_t), 16);
}

template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    topk_gating_kernel(const TopkGatingParams p, int64_t warp_bytes) {
    using Compute = ComputeType<T>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x;
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= p.num_tokens) return;
    Compute* const scores = reinterpret_cast<Compute*>(shared + threadIdx.y * warp_bytes);
    auto* const keys = reinterpret_cast<Key<Compute>*>(scores + p.num_experts);
    auto* const group_keys = keys + p.num_experts;
    auto* const chosen = reinterpret_cast<int32_t*>(group_keys + p.num_groups);

    score_row(p.scoring, static_cast<const T*>(p.logits) + token * p.num_experts, p.num_experts, scores);
    const Compute* const bias = static_cast<const Compute*>(p.bias);
    for (int e = lane; e < p.num_experts; e += kWarpSize) {
        keys[e] = to_key(bias == nullptr ? scores[e] : scores[e] + bias[e]);
    }
    __syncwarp();
    if (p.top_groups < p.num_groups) keep_best_groups<Compute>(p, keys, group_keys);

    Compute sum = 0;
    {
        Selector<Key<Compute>> best(keys, p.num_experts);
        for (int j = 0; j < p.k; ++j) {
            const int expert = best.take();
            sum += scores[expert];
            if (lane == 0) chosen[j] = expert;
        }
        __syncwarp();
    }
    if (bias != nullptr) {
        // The bias decides who is selected, the score alone who comes first.
        for (int e = lane; e < p.num_experts; e += kWarpSize)
            keys[e] = 0;
        __syncwarp();
        for (int j = lane; j < p.k; j += kWarpSize)
            keys[chosen[j]] = to_key(scores[chosen[j]]);
        Selector<Key<Compute>> best(keys, p.num_experts);
        sum = 0;
        for (int j = 0; j < p.k; ++j) {
            const int expert = best.take();
            sum += scores[expert];
            if (lane == 0) chosen[j] = expert;
        }
        __syncwarp();
    }
    const Compute factor =
        static_cast<Compute>(p.scale) / (p.normalize ? sum + static_cast<Compute>(kNormalizeEpsilon) : Compute(1));
    for (int j = lane; j < p.k; j += kWarpSize) {
        static_cast<Compute*>(p.gates)[token * p.k + j] = scores[chosen[j]] * factor;
        p.expert_ids[token * p.k + j] = chosen[j];
    }
}

// With p the scores, s = sum of the chosen ones and f the scale:
//   dL/dp_e = f (g_e - sum_j g_j p_j / s) / s where normalized, else f g_e, for the chosen experts and zero for the
//   others softmax: dL/dx_e = p_e (dL/dp_e - sum_j p_j dL/dp_j); sigmoid: dL/dx_e = p_e (1 - p_e) dL/dp_e
template <typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    topk_gating_backward_kernel(const TopkGatingBackwardParams p, int64_t warp_bytes) {
    using Compute = ComputeType<T>;
    extern __shared__ __align__(16) unsigned char shared[];
    const int lane = threadIdx.x;
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= p.num_tokens) return;
    Compute* const scores = reinterpret_cast<Compute*>(shared + threadIdx.y * warp_bytes);
    Compute* const grad_scores = scores + p.num_experts;
    const int64_t* const ids = p.expert_ids + token * p.k;
    const Compute* const grad = static_cast<const Compute*>(p.grad_gates) + token * p.k;
    const auto valid = [&](int64_t id) { return id >= 0 && id < p.num_experts; };

    score_row(p.scoring, static_cast<const T*>(p.logits) + token * p.num_experts, p.num_experts, scores);
    for (int e = lane; e < p.num_experts; e += kWarpSize)
        grad_scores[e] = 0;
    __syncwarp();
    Compute sum = 0, weighted = 0;
    for (int j = lane; j < p.k; j += kWarpSize) {
        if (!valid(ids[j])) continue;
        sum += scores[ids[j]];
        weighted += grad[j] * scores[ids[j]];
    }
    const Compute denominator = warp_sum(sum) + static_cast<Compute>(kNormalizeEpsilon);
    weighted = warp_sum(weighted);
    const Compute factor = static_cast<Compute>(p.scale);
    Compute mean = 0;
    for (int j = lane; j < p.k; j += kWarpSize) {
        if (!valid(ids[j])) continue;
        const Compute grad_score =
            p.normalize ? factor * (grad[j] - weighted / denominator) / denominator : factor * grad[j];
        grad_scores[ids[j]] = grad_score;
        mean += grad_score * scores[ids[j]];
    }
    mean = warp_sum(mean);
    __syncwarp();
    T* const out = static_cast<T*>(p.grad_logits) + token * p.num_experts;
    for (int e = lane; e < p.num_experts; e += kWarpSize) {
        const Compute score = scores[e];
        const Compute value = p.scoring == Scoring::kSoftmax ? score * (grad_scores[e] - mean)
                                                             : score * (Compute(1) - score) * grad_scores[e];
        out[e] = from_compute<T>(value);
    }
}

// One warp for each token, as many warps in a block as shared memory allows.
template <typename Kernel, typename Params>
cudaError_t launch(Kernel kernel, const Params& p, int64_t warp_bytes, cudaStream_t stream) {
    if (warp_bytes > kSharedBudget) return cudaErrorInvalidConfiguration;
    const int64_t budget = warp_bytes > kDefaultShared ? kSharedBudget : kDefaultShared;
    const auto warps = static_cast<unsigned>(std::clamp<int64_t>(budget / warp_bytes, 1, kMaxWarps));
    if (budget > kDefaultShared) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBudget);
        if (error != cudaSuccess) return error;
    }
    kernel<<<static_cast<unsigned>(ceil_div(p.num_tokens, warps)), dim3(kWarpSize, warps), warps * warp_bytes,
             stream>>>(p, warp_bytes);
    return cudaGetLastError();
}

}  // namespace

cudaError_t topk_gating(const TopkGatingParams& p, cudaStream_t stream) {
    if (p.num_tokens == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch(topk_gating_kernel<T>, p, shared_bytes<ComputeType<T>>(p), stream);
    });
}

cudaError_t topk_gating_backward(const TopkGatingBackwardParams& p, cudaStream_t stream) {
    if (p.num_tokens == 0 || p.num_experts == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return launch(topk_gating_backward_kernel<T>, p,
                      round_up(int64_t{2} * p.num_experts * sizeof(ComputeType<T>), 16), stream);
    });
}

}  // namespace scattermoe::kernels
