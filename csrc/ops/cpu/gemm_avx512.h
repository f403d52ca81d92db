#pragma once

#include <cstdint>

namespace scattermoe::cpu {

// out = a b, or out += a b where `accumulate` is set; strides count elements. Rows of `out` are contiguous, and so are
// either the rows of b, whatever a's strides, or the columns of b and the rows of a.
struct Gemm {
    float* out;  // [m, n]
    int64_t out_stride;
    const float* a;  // [m, k]
    int64_t a_row_stride;
    int64_t a_column_stride;
    const float* b;  // [k, n]
    int64_t b_row_stride;
    int64_t b_column_stride;
    int64_t m;
    int64_t n;
    int64_t k;
    bool accumulate;
};

// Whether this was compiled for a processor that may have AVX-512.
bool has_gemm_avx512();

// For one thread, on a processor with AVX-512 (F and VL). A general library first copies operands into the order its
// kernel reads, clears the result, then adds to it: where an expert has a few dozen rows, that is a third of the time.
// Here all operands are read where they lie, which a product of this shape can afford: its smaller operand stays in the
// L2 cache, and what comes from memory next is prefetched.
void gemm_avx512(const Gemm& gemm);

}  // namespace scattermoe::cpu
