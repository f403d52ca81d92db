#pragma once

// Clusters: blocks on neighbouring SMs that reach each other's shared memory.

#include <cuda_runtime.h>

#include <cstdint>

namespace scattermoe::kernels::ptx {

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of the cluster; what they wrote before it is seen after it.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where a shared-memory address of this block is in another block of the cluster.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Without a release at the scope of the cluster, which is a memory barrier for each arrival: for who has only read.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t cluster_address) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}

__device__ __forceinline__ void store_cluster_64(uint32_t cluster_address, int low, int high) {
    asm volatile("st.volatile.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(cluster_address), "r"(low), "r"(high)
                 : "memory");
}

}  // namespace scattermoe::kernels::ptx
