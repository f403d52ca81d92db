#pragma once

// Which numbers a block's tiles have. Handed out one by one by a counter in memory, so that what runs at one time are
// neighbours: blocks that were given every grid-th tile beforehand drift apart, and no longer find in L2 what others of
// the same rows or columns have read. And which tiles the numbers mean, which the producer finds out for the consumers.

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/shared_memory.h"
#include "../vector.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

// The first two tiles are the block's own by its number. A later one is fetched by the producer when it begins the
// second before, and published when it begins the one before: nobody waits for the counter. An entry holds a number and
// which of the block's tiles it belongs to, in one piece, and is its own flag. Nobody is asked whether an entry may be
// overwritten: the producer is never further ahead of a consumer than there are stages, each tile having one at least.
//
// A pair has its numbers in common; the first block fetches them and publishes them to both.
//
// What a number means takes more than a thousand cycles to find out. The consumers, whose tensor cores would be idle
// meanwhile, read it from another entry, which the producer writes when it has found out for itself.
template <typename Tile, bool kPaired>
class TileQueue {
    static constexpr int kTileWords = sizeof(Tile) / 4;
    struct Words {
        int words[kTileWords];
    };
    static_assert(kTileWords * 4 == sizeof(Tile) && kTileWords <= 6);

  public:
    __device__ __forceinline__ TileQueue(uint32_t entries, int* counter) : entries_(entries), counter_(counter) {}

    // One thread; the block synchronises afterwards.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < kQueueEntries; ++i) {
            store(i, own(i), i < kOwn ? i : -1);
            ptx::store_shared_32(tile_entry(i) + kTileFlag, -1);
        }
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

    // One thread of the producer's first warp, not before begin(i - 1) ...
    __device__ __forceinline__ void publish_tile(int i, const Tile& tile) const {
        const auto words = __builtin_bit_cast(Words, tile);
#pragma unroll
        for (int word = 0; word < kTileWords; ++word)
            ptx::store_shared_32(tile_entry(i) + word * 4, words.words[word]);
        ptx::store_shared_32(tile_entry(i) + kTileExists, 1);
        ptx::store_shared_release(tile_entry(i) + kTileFlag, i);
    }
    // ... or where there is no tile `i`, nor one after it: consumers that have tiles in turns ask for either.
    __device__ __forceinline__ void publish_no_tile(int i) const {
        for (int after = 0; after < kConsumers; ++after) {
            ptx::store_shared_32(tile_entry(i + after) + kTileExists, 0);
            ptx::store_shared_release(tile_entry(i + after) + kTileFlag, i + after);
        }
    }

    // The block's tile `i`, or false; the whole warp asks, and knows that it agrees, as above.
    __device__ __forceinline__ bool tile(int i, Tile& tile) const {
        while (!__all_sync(kFullWarp, ptx::load_shared_acquire(tile_entry(i) + kTileFlag) == i)) {
        }
        Words words;
#pragma unroll
        for (int word = 0; word < kTileWords; ++word)
            words.words[word] =
                static_cast<int>(__reduce_max_sync(kFullWarp, ptx::load_shared_32(tile_entry(i) + word * 4)));
        tile = __builtin_bit_cast(Tile, words);
        return __reduce_max_sync(kFullWarp, ptx::load_shared_32(tile_entry(i) + kTileExists)) != 0;
    }

  private:
    static constexpr int kOwn = 2;
    static constexpr int kBlocks = kPaired ? kPair : 1;
    static constexpr int kTileExists = 24, kTileFlag = 28, kTileBytes = 32;
    static_assert(kQueueEntries > kMaxStages + 3 && kQueueEntries * (8 + kTileBytes) <= kQueueBytes);

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
    __device__ __forceinline__ uint32_t tile_entry(int i) const {
        return entries_ + kQueueEntries * 8 + i % kQueueEntries * kTileBytes;
    }
    __device__ __forceinline__ void store(int i, int number, int tile) const {
        asm volatile("st.volatile.shared.v2.b32 [%0], {%1, %2};" ::"r"(entry(i)), "r"(number), "r"(tile) : "memory");
    }

    uint32_t entries_;
    int* counter_;
    int fetched_ = 0;
};

}  // namespace scattermoe::kernels::sm90
