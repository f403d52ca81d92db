#include "rows.h"

#include <ATen/Parallel.h>

#include <cstring>

namespace scattermoe::cpu {

namespace {

constexpr int64_t kBytesPerTask = 1 << 16;

// Runs f(i) for the rows [0, count), each moving row_bytes.
template <typename F>
void for_each_row(int64_t count, int64_t row_bytes, const F& f) {
    const int64_t rows_per_task = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes));
    at::parallel_for(0, count, rows_per_task, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            f(i);
    });
}

char* bytes(const at::Tensor& tensor) {
    return static_cast<char*>(tensor.data_ptr());
}

const char* const_bytes(const at::Tensor& tensor) {
    return static_cast<const char*>(tensor.const_data_ptr());
}

int64_t row_stride_bytes(const at::Tensor& tensor) {
    return tensor.stride(0) * tensor.element_size();
}

int64_t row_bytes(const at::Tensor& tensor) {
    return tensor.size(1) * tensor.element_size();
}

}  // namespace

at::Tensor with_contiguous_rows(const at::Tensor& x) {
    return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

void gather_rows(const at::Tensor& out, const at::Tensor& x, const int32_t* slots, int64_t top_k) {
    char* destination = bytes(out);
    const char* source = const_bytes(x);
    const int64_t size = row_bytes(x), stride = row_stride_bytes(x);
    for_each_row(out.size(0), size,
                 [&](int64_t i) { std::memcpy(destination + i * size, source + slots[i] / top_k * stride, size); });
}

void scatter_rows(const at::Tensor& out, const at::Tensor& rows, const int32_t* slots) {
    char* destination = bytes(out);
    const char* source = const_bytes(rows);
    const int64_t size = row_bytes(rows);
    for_each_row(rows.size(0), size,
                 [&](int64_t i) { std::memcpy(destination + slots[i] * size, source + i * size, size); });
}

void zero_rows(const at::Tensor& out, const int32_t* slots, int64_t count) {
    char* destination = bytes(out);
    const int64_t size = row_bytes(out);
    for_each_row(count, size, [&](int64_t i) { std::memset(destination + slots[i] * size, 0, size); });
}

}  // namespace scattermoe::cpu
