#pragma once

// The ring of stages between the producer and the consumers, and the order of the consumers among themselves.

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/cluster.h"
#include "../ptx/cp_async.h"
#include "../ptx/mbarrier.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

// Hardware barriers that threads of consumer warpgroups meet at.
enum class NamedBarrier : int {
    kBlock = 0,  // __syncthreads()
    kTail = 1,   // and the next one: zeroed rows are in place, of all consumers or of each warpgroup
    kStore = 3,  // and the next one: a consumer warpgroup's staging buffer
};

// A place in the ring and the parity of its current turn.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ void advance(int count) {
        const int turns = (stage + count) / kStages;
        stage += count - turns * kStages;
        parity ^= turns & 1;
    }
};

// Barriers of a block, as shared-memory addresses. A stage is full when its bytes have landed, empty when the
// consumers' products have read it.
// kPaired: a stage is empty when the consumers of both blocks have read it, for each block fills part of both's.
template <int kStages, bool kPaired = false>
class Pipeline {
  public:
    using Position = RingPosition<kStages>;

    __device__ __forceinline__ explicit Pipeline(uint32_t barriers) : barriers_(barriers) {}

    // One thread initialises; the block synchronises afterwards.
    __device__ __forceinline__ void init(int full_arrivals, bool ping_pong) const {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(full(stage), full_arrivals);
            // A lane of each warp that reads it.
            ptx::mbarrier_init(empty(stage), ping_pong ? 4 : kConsumerWarps * (kPaired ? kPair : 1));
        }
        for (int consumer = 0; consumer < kConsumers; ++consumer)
            ptx::mbarrier_init(turn(consumer), 4);
        ptx::mbarrier_init_fence();
    }

    __device__ __forceinline__ uint32_t full(int stage) const { return barriers_ + stage * 8; }
    __device__ __forceinline__ void wait_full(const Position& at) const {
        ptx::mbarrier_wait(full(at.stage), at.parity);
    }
    // The first turn of every stage finds it empty.
    __device__ __forceinline__ void wait_empty(const Position& at) const {
        ptx::mbarrier_wait(empty(at.stage), at.parity ^ 1);
    }
    __device__ __forceinline__ void release(int stage, int lane) const {
        if constexpr (kPaired) {
            if (lane < kPair) ptx::mbarrier_arrive_cluster(ptx::cluster_address(empty(stage), lane));
        } else {
            if (lane == 0) ptx::mbarrier_arrive(empty(stage));
        }
    }

    // Ping-pong consumers issue the products of their tiles in turns: for the tensor cores' sake, and because a stage's
    // full barrier tells only the parity of its turn, so that nobody may look a turn ahead. Consumer 0 begins.
    __device__ __forceinline__ void wait_turn(int consumer, uint32_t& parity) const {
        ptx::mbarrier_wait(turn(consumer), parity);
        parity ^= 1;
    }
    __device__ __forceinline__ static uint32_t first_turn(int consumer) { return consumer == 0 ? 1 : 0; }
    __device__ __forceinline__ void pass_turn(int consumer, int lane) const {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(turn(consumer ^ 1));
    }

  private:
    __device__ __forceinline__ uint32_t empty(int stage) const { return barriers_ + (kStages + stage) * 8; }
    __device__ __forceinline__ uint32_t turn(int consumer) const { return barriers_ + (2 * kStages + consumer) * 8; }

    uint32_t barriers_;
};

// The address as a value like any other: the compiler would else derive it anew from special registers in every loop.
__device__ __forceinline__ uint32_t opaque_address(const void* shared) {
    uint32_t address = ptx::shared_address(shared);
    asm volatile("" : "+r"(address));
    return address;
}

// Once barriers are there ...
template <Tile kTile>
__device__ __forceinline__ void sync_block() {
    if constexpr (tile_shape(kTile).paired) {
        ptx::cluster_sync();
    } else {
        __syncthreads();
    }
}
// ... and when they are not needed any more: the other of a pair may still reach for them.
template <Tile kTile>
__device__ __forceinline__ void leave_block() {
    if constexpr (tile_shape(kTile).paired) ptx::cluster_sync();
}

// Where things lie in the block's shared memory. Tiles start at multiples of 1024 bytes, as the swizzle wants.
template <Tile kTile>
struct SharedLayout {
    static constexpr TileShape kShape = tile_shape(kTile);
    static constexpr int kStages = stage_count(kTile);
    static constexpr int kB = kStages * kShape.a_bytes();
    static constexpr int kStaging = kB + kStages * kShape.b_bytes();
    static constexpr int kBarriers = kStaging + staging_bytes(kTile);
    static constexpr int kQueue = kBarriers + kBarrierBytes - kQueueBytes;
    static_assert(kShape.a_bytes() % 1024 == 0 && kShape.b_bytes() % 1024 == 0 && kStages <= kMaxStages);
    static_assert(kBarriers + kBarrierBytes == shared_bytes(kTile) && shared_bytes(kTile) <= kSharedBytes);
};

}  // namespace scattermoe::kernels::sm90
