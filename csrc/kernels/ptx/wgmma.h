#pragma once

// wgmma: D += A B^T by one warpgroup, a 64 x N block and 16 of the contraction at a time, float32 accumulation, both
// operands in shared memory. Asynchronous: fence, products, commit, wait.
//
// Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of D; a lane holds, for each block j of eight columns, d[4 j ..
// 4 j + 3]: row lane / 4, columns 8 j + 2 (lane % 4) and the next, then the same of the row eight below.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../select.h"

namespace scattermoe::kernels::ptx {

// Before the first product, and whenever registers of D were touched in between.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Where an operand lies in shared memory, in the layout that TMA writes with 128-byte swizzle: atoms of eight rows of
// 128 bytes, `stride_bytes` from one to the next; along the other direction, atoms `leading_bytes` apart (unused where
// one row of atoms covers the contraction). Addresses count 16 bytes, so adding bytes / 16 to the low word moves the
// operand. The high word is a constant; apart, so that nobody adds up 64 bits between two products.
constexpr uint32_t wgmma_descriptor_high(uint32_t stride_bytes) {
    constexpr uint32_t kSwizzle128 = uint32_t{1} << 30;
    return stride_bytes >> 4 | kSwizzle128;
}
__device__ __forceinline__ uint32_t wgmma_descriptor_low(uint32_t shared, uint32_t leading_bytes) {
    return (shared & 0x3ffff) >> 4 | (leading_bytes >> 4) << 16;
}

// Inline assembly wants every register by name, so these lists are spelt out; the widths there are differ in their
// number.
// clang-format off
#define SCATTERMOE_D8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SCATTERMOE_D32(i) SCATTERMOE_D8(i), SCATTERMOE_D8(i + 8), SCATTERMOE_D8(i + 16), SCATTERMOE_D8(i + 24)
#define SCATTERMOE_D64 SCATTERMOE_D32(0), SCATTERMOE_D32(32)
#define SCATTERMOE_D96 SCATTERMOE_D64, SCATTERMOE_D32(64)
#define SCATTERMOE_D128 SCATTERMOE_D96, SCATTERMOE_D32(96)
#define SCATTERMOE_R64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SCATTERMOE_R96 \
    SCATTERMOE_R64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SCATTERMOE_R128 \
    SCATTERMOE_R96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// clang-format on

// N, the element type, the list of D's registers and the numbers of the operands after them.
#define SCATTERMOE_WGMMA(N, TYPE, REGISTERS, A, B, ACCUMULATE, MAJOR_A, MAJOR_B, HIGH_A, HIGH_B, ...)     \
    asm volatile("{\n.reg .pred accumulate;\n.reg .b64 a, b;\nsetp.ne.b32 accumulate, %" #ACCUMULATE      \
                 ", 0;\nmov.b64 a, {%" #A ", %" #HIGH_A "};\nmov.b64 b, {%" #B ", %" #HIGH_B              \
                 "};\n"                                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS           \
                 "}, a, b, accumulate, 1, 1, %" #MAJOR_A ", %" #MAJOR_B ";\n}\n"                          \
                 : __VA_ARGS__                                                                            \
                 : "r"(a), "r"(b), "r"(static_cast<int>(accumulate)), "n"(kMajorA == Major::kMn ? 1 : 0), \
                   "n"(kMajorB == Major::kMn ? 1 : 0), "n"(kHighA), "n"(kHighB))

// d = a b^T, added to d where `accumulate`. a and b are the low words of their descriptors.
template <typename Element, Major kMajorA, Major kMajorB, uint32_t kHighA, uint32_t kHighB, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint32_t a, uint32_t b, bool accumulate) {
    static_assert(kN == 128 || kN == 192 || kN == 256);
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        if constexpr (kN == 128) {
            SCATTERMOE_WGMMA(128, "bf16", SCATTERMOE_R64, 64, 65, 66, 67, 68, 69, 70, SCATTERMOE_D64);
        } else if constexpr (kN == 192) {
            SCATTERMOE_WGMMA(192, "bf16", SCATTERMOE_R96, 96, 97, 98, 99, 100, 101, 102, SCATTERMOE_D96);
        } else {
            SCATTERMOE_WGMMA(256, "bf16", SCATTERMOE_R128, 128, 129, 130, 131, 132, 133, 134, SCATTERMOE_D128);
        }
    } else {
        static_assert(std::is_same_v<Element, __half>);
        if constexpr (kN == 128) {
            SCATTERMOE_WGMMA(128, "f16", SCATTERMOE_R64, 64, 65, 66, 67, 68, 69, 70, SCATTERMOE_D64);
        } else if constexpr (kN == 192) {
            SCATTERMOE_WGMMA(192, "f16", SCATTERMOE_R96, 96, 97, 98, 99, 100, 101, 102, SCATTERMOE_D96);
        } else {
            SCATTERMOE_WGMMA(256, "f16", SCATTERMOE_R128, 128, 129, 130, 131, 132, 133, 134, SCATTERMOE_D128);
        }
    }
}

#undef SCATTERMOE_WGMMA
#undef SCATTERMOE_R128
#undef SCATTERMOE_R96
#undef SCATTERMOE_R64
#undef SCATTERMOE_D128
#undef SCATTERMOE_D96
#undef SCATTERMOE_D64
#undef SCATTERMOE_D32
#undef SCATTERMOE_D8

}  // namespace scattermoe::kernels::ptx
