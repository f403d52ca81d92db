#pragma once

// What a warp holds of a finished tile, in registers, while it already multiplies the next one: its sums, rounded. They
// are stored step by step between those products.

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "staged_store.h"

namespace scattermoe::kernels::sm90 {

// kSums of a lane, rounded: half as many registers as they had.
template <typename Element, int kSums>
class HeldSums {
  public:
    __device__ __forceinline__ void hold(const float (&sums)[kSums]) {
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i)
            words_[i] = pack<Element>(sums[2 * i], sums[2 * i + 1]);
    }

    // Of eight columns, 2 (lane % 4) and the next: of row lane / 4 and of the row eight below.
    __device__ __forceinline__ uint2 block(int j) const { return make_uint2(words_[2 * j], words_[2 * j + 1]); }

  private:
    uint32_t words_[kSums / 2];
};

// Calls f with `index` as a constant, one of kCount: registers have no addresses.
template <int kCount, typename F>
__device__ __forceinline__ void with_constant(int index, F&& f) {
    [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
        (void)((index == kIndices && (f.template operator()<kIndices>(), true)) || ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// The steps in which what is held is stored: each sends what the one before has staged, and stages something itself.
class HeldSteps {
  public:
    __device__ __forceinline__ void begin(int stages) {
        step_ = 0;
        stages_ = stages;
    }
    // False where nothing is left to do.
    template <typename Send, typename Stage>
    __device__ __forceinline__ bool next(Send&& send, Stage&& stage) {
        if (step_ > stages_) return false;
        if (step_ > 0) send(step_ - 1);
        if (step_ < stages_) stage(step_);
        ++step_;
        return true;
    }

  private:
    int step_ = 0, stages_ = -1;
};

}  // namespace scattermoe::kernels::sm90
