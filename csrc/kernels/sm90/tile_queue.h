#pragma once

// Which numbers a block's tiles have. Handed out one by one by a counter in memory, so that what runs at one time are
// neighbours: blocks that were given every grid-th tile beforehand drift apart, and no longer find in L2 what others of
// the same rows or columns have read.

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/cluster.h"
#include "../vector.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

// The first two tiles are the block's own by its number. A later one is fetched by the producer when it begins the
// second before, and published when it begins the one before: nobody waits for the counter. An entry holds a number and
// which of the block's tiles it belongs to, in one piece, and is its own flag. Nobody is asked whether an entry may be
// overwritten: the producer is never further ahead of a consumer than there are stages, each tile having one at least.
//
// A pair has its tiles in common; the first block fetches numbers and publishes them to both.
template <bool kPaired>
class TileQueue {
  public:
    __device__ __forceinline__ TileQueue(uint32_t entries, int* counter) : entries_(entries), counter_(counter) {}

    // One thread; the block synchronises afterwards.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < kQueueEntries; ++i)
            store(i, own(i), i < kOwn ? i : -1);
    }

    // The number of the block's tile `i`; the whole warp asks. By way of a vote and a reduction, so that the compiler
    // knows it, and all that is decided by it, to be the same in every lane: barriers and copies whose addresses might
    // not be cost a tenth of the speed.
    __device__ __forceinline__ int number(int i) const {
        int number, tile;
        do {
            asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%2];"
                         : "=r"(number), "=r"(tile)
                         : "r"(entry(i))
                         : "memory");
        } while (!__all_sync(kFullWarp, tile == i));
        return __reduce_max_sync(kFullWarp, number);
    }

    // One thread of the producer, when it begins tile `i` ...
    __device__ __forceinline__ void begin(int i) {
        if (follows()) return;
        if (i > 0) publish(i + 1, fetched_);
        fetched_ = counter_ == nullptr ? own(i + kOwn) : kOwn * holders() + atomicAdd(counter_, 1);
    }
    // ... and when there is no tile `i`.
    __device__ __forceinline__ void end(int i) const {
        if (!follows()) publish(i + 1, INT32_MAX);
    }

  private:
    static constexpr int kOwn = 2;
    static constexpr int kBlocks = kPaired ? kPair : 1;
    static_assert(kQueueEntries > kMaxStages + 3 && kQueueEntries * 8 <= kQueueBytes);

    __device__ __forceinline__ static int own(int i) { return static_cast<int>(blockIdx.x) / kBlocks + i * holders(); }
    // Blocks, or pairs, that have tiles.
    __device__ __forceinline__ static int holders() { return static_cast<int>(gridDim.x) / kBlocks; }
    __device__ __forceinline__ bool follows() const {
        return kPaired && counter_ != nullptr && ptx::cluster_rank() != 0;
    }
    __device__ __forceinline__ void publish(int i, int number) const {
        store(i, number, i);
        if (kPaired && counter_ != nullptr) ptx::store_cluster_64(ptx::cluster_address(entry(i), 1), number, i);
    }
    __device__ __forceinline__ uint32_t entry(int i) const { return entries_ + i % kQueueEntries * 8; }
    __device__ __forceinline__ void store(int i, int number, int tile) const {
        asm volatile("st.volatile.shared.v2.b32 [%0], {%1, %2};" ::"r"(entry(i)), "r"(number), "r"(tile) : "memory");
    }

    uint32_t entries_;
    int* counter_;
    int fetched_ = 0;
};

}  // namespace scattermoe::kernels::sm90
