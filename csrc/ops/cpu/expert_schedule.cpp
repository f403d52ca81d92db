#include "expert_schedule.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <queue>
#include <vector>

#include "memory.h"

namespace scattermoe::cpu {

void Scratch::reset(int64_t numel) {
    if (!buffer_.defined() || buffer_.numel() < numel) buffer_ = cpu::empty({numel}, options_);
    used_ = 0;
}

at::Tensor Scratch::take(int64_t rows, int64_t columns) {
    TORCH_INTERNAL_ASSERT(used_ + rows * columns <= buffer_.numel());
    at::Tensor block = buffer_.narrow(0, used_, rows * columns).view({rows, columns});
    used_ += rows * columns;
    return block;
}

namespace {

// The time, in rows, until the last thread ends when each free thread takes the next expert of the list.
int64_t makespan(const std::vector<int64_t>& experts, size_t first, const Grouping& grouping, int num_threads) {
    std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> busy_until;
    for (int thread = 0; thread < num_threads; ++thread)
        busy_until.push(0);
    int64_t last = 0;
    for (size_t i = first; i < experts.size(); ++i) {
        const int64_t done = busy_until.top() + grouping.end(experts[i]) - grouping.begin(experts[i]);
        busy_until.pop();
        busy_until.push(done);
        last = std::max(last, done);
    }
    return last;
}

// How many of the largest experts should run with all threads inside them.
size_t count_shared_experts(const std::vector<int64_t>& largest_first, const Grouping& grouping, int num_threads) {
    if (num_threads == 1) return 0;
    // A product shared by all threads runs at about this fraction of what the threads do on products of their own.
    constexpr double kSharedEfficiency = 0.9;
    size_t best = 0;
    double best_time = static_cast<double>(makespan(largest_first, 0, grouping, num_threads));
    const double ideal = static_cast<double>(grouping.num_rows()) / num_threads;
    int64_t shared_rows = 0;
    const size_t candidates = std::min(largest_first.size(), static_cast<size_t>(num_threads));
    for (size_t shared = 1; shared <= candidates && best_time > 1.1 * ideal; ++shared) {
        const int64_t expert = largest_first[shared - 1];
        shared_rows += grouping.end(expert) - grouping.begin(expert);
        const double time = static_cast<double>(shared_rows) / (num_threads * kSharedEfficiency) +
                            static_cast<double>(makespan(largest_first, shared, grouping, num_threads));
        if (time < best_time) {
            best_time = time;
            best = shared;
        }
    }
    return best;
}

}  // namespace

void for_each_expert(const Grouping& grouping, const at::TensorOptions& scratch_options,
                     const std::function<void(int64_t expert, Scratch& scratch)>& body) {
    std::vector<int64_t> largest_first(grouping.num_experts());
    std::iota(largest_first.begin(), largest_first.end(), 0);
    std::stable_sort(largest_first.begin(), largest_first.end(), [&](int64_t a, int64_t b) {
        return grouping.end(a) - grouping.begin(a) > grouping.end(b) - grouping.begin(b);
    });
    const int num_threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const size_t num_shared = count_shared_experts(largest_first, grouping, num_threads);

    if (num_shared > 0) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        Scratch scratch(scratch_options);
        for (size_t i = 0; i < num_shared; ++i)
            body(largest_first[i], scratch);
    }
    std::atomic<size_t> next{num_shared};
    const auto num_left = static_cast<int64_t>(largest_first.size() - num_shared);
    at::parallel_for(0, std::min<int64_t>(num_threads, num_left), 1, [&](int64_t /*begin*/, int64_t /*end*/) {
        at::AutoDispatchBelowADInplaceOrView below_autograd;  // thread-local, so each thread needs its own
        Scratch scratch(scratch_options);
        for (size_t i = next++; i < largest_first.size(); i = next++)
            body(largest_first[i], scratch);
    });
}

}  // namespace scattermoe::cpu
