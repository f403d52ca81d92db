#pragma once

// The bulk tensor copy engine (TMA): boxes of a tensor that a CUtensorMap describes, between global and shared memory.
// Coordinates count elements, fastest dimension first. What lies outside the tensor is read as zero and not written.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared),
        "l"(&map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y,
                                         int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(shared),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z,
                                         int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(shared),
        "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

// The same to several blocks of a cluster, those whose bits are set, at the same place of each one's shared memory;
// the bytes are counted by the same barrier of each.
__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                                   uint16_t blocks, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "h"(blocks), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                                   uint16_t blocks, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "h"(blocks), "r"(x), "r"(y), "r"(z)
        : "memory");
}

__device__ __forceinline__ void tma_load_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                                   uint16_t blocks, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "h"(blocks), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap& map, uint32_t shared, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(shared), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// Stores of a thread complete in groups, in order.
__device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending groups have yet to be read from shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void tma_store_wait_all() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

}  // namespace scattermoe::kernels::ptx
