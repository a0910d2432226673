// packed_attention: one (sequence, head) at a time, so that its keys and values stay in the cache.
//
// A head's rows are copied out of the packed batch once, converted to the type that sums run in. Scores exist
// for one block of queries at a time and lie transposed, (keys, queries): each vector holds one key's scores
// for neighbouring queries, so a softmax runs down the rows and never across a vector. All products are
// `multiply` of tile.h.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "fastshap/attention.h"
#include "fastshap/sequences.h"

namespace fastshap {
namespace {

// from (rows, head_dim), rows `stride` apart → to (rows, wide) times `scale`; columns past head_dim are 0.
template <typename T, typename A>
FASTSHAP_INLINE void copy_rows_body(const T* __restrict from, int64_t stride, int64_t rows, int64_t head_dim,
                                    A scale, A* __restrict to, int64_t wide) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += wide) {
    int64_t i = 0;
    for (; i + kPanel<A> <= head_dim; i += kPanel<A>) {
      // A constant count: without it the loop's preparations cost more than a short row.
      for (int64_t j = 0; j < kPanel<A>; ++j) to[i + j] = static_cast<A>(from[i + j]) * scale;
    }
    for (; i < head_dim; ++i) to[i] = static_cast<A>(from[i]) * scale;
    for (; i < wide; ++i) to[i] = 0;
  }
}
template <typename T, typename A>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t head_dim, A scale, A* to, int64_t wide) {
  FASTSHAP_CLONED(copy_rows_body(from, stride, rows, head_dim, scale, to, wide));
}

// Scores (keys, queries) → exp(score − largest), and for each query the largest and the sum of those.
template <typename A>
void exponentiate(A* scores, int64_t keys, int64_t queries, A* largest, A* sum) {
  with_vectors([&]<int64_t kBytes>() FASTSHAP_INLINE_BODY {
    using V = vector_t<A, kBytes>;
    for (int64_t query = 0; query < queries; query += kLanes<A, kBytes>) {
      A* column = scores + query;
      V highest = load<kBytes>(column);
      for (int64_t key = 1; key < keys; ++key) {
        highest = larger<V>(load<kBytes>(column + key * kQueries), highest);
      }
      store(largest + query, highest);
      store(sum + query, sum_rows<V>(keys, [&](int64_t key) FASTSHAP_INLINE_BODY {
              const V power = exponential<kBytes>(load<kBytes>(column + key * kQueries) - highest, A(0));
              store(column + key * kQueries, power);
              return power;
            }));
    }
  });
}

// What `exponentiate` makes of scores, its sums, and the gradient of the probabilities → probabilities p in
// place of the scores and, in place of the gradient, that of the scores: p · (gradient − Σ p · gradient).
//
// Where only one key counts, or the gradient hardly differs between keys, everything cancels but the rounding
// of that mean: so the mean of the differences from it is subtracted too.
template <typename A>
void differentiate(A* powers, const A* sum, A* gradient, int64_t keys, int64_t queries) {
  with_vectors([&]<int64_t kBytes>() FASTSHAP_INLINE_BODY {
    using V = vector_t<A, kBytes>;
    for (int64_t query = 0; query < queries; query += kLanes<A, kBytes>) {
      A *column = powers + query, *grad = gradient + query;
      const V share = A(1) / load<kBytes>(sum + query);
      const V mean = sum_rows<V>(keys, [&](int64_t key) FASTSHAP_INLINE_BODY {
        const V probability = load<kBytes>(column + key * kQueries) * share;
        store(column + key * kQueries, probability);
        return probability * load<kBytes>(grad + key * kQueries);
      });
      const V rest = sum_rows<V>(keys, [&](int64_t key) FASTSHAP_INLINE_BODY {
        const V difference = load<kBytes>(grad + key * kQueries) - mean;
        store(grad + key * kQueries, difference);
        return load<kBytes>(column + key * kQueries) * difference;
      });
      for (int64_t at = 0; at < keys * kQueries; at += kQueries) {
        store(grad + at, load<kBytes>(column + at) * (load<kBytes>(grad + at) - rest));
      }
    }
  });
}

// Asks the cache for one head's share of the next sequence, whose rows are `width` values. A head's own
// pieces of the rows are too short and too far apart for the processor to see them coming.
template <typename T>
void prefetch_next(const T* rows, int64_t width, const int32_t* starts, int64_t sequences, int64_t s,
                   int64_t head, int64_t heads) {
  if (s + 1 == sequences) return;
  const int64_t share = (starts[s + 2] - starts[s + 1]) * width * sizeof(T) / heads;
  const char* from = reinterpret_cast<const char*>(rows + starts[s + 1] * width) + head * share;
  for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <typename T>
Head<T> make_head(const Heads& heads, const T* qkv, const int32_t* starts, int64_t sequence, int64_t head) {
  const int64_t width = heads.heads * heads.head_dim;
  const T* query = qkv + starts[sequence] * 3 * width + head * heads.head_dim;
  return {query, query + width, query + 2 * width, starts[sequence + 1] - starts[sequence], 3 * width};
}

// Values that `attend` takes from its scratch for a head of at most this length.
template <typename A>
int64_t forward_scratch(const Heads& heads, int64_t length) {
  const int64_t wide = round_up(heads.head_dim, kPanel<A>);
  return 2 * length * wide + kQueries * (3 * wide + length + 2);
}

// out and logsumexp of one head; their rows are heads · head_dim and heads apart.
template <typename T, typename A>
void attend(const Heads& heads, const Head<T>& head, Scratch<A>& scratch, T* out, A* logsumexp) {
  const int64_t head_dim = heads.head_dim, length = head.length, wide = round_up(head_dim, kPanel<A>);
  scratch.start();
  A *key = scratch.take(length * wide), *value = scratch.take(length * wide);
  A *query = scratch.take(kQueries * wide), *query_columns = scratch.take(kQueries * wide);
  A *scores = scratch.take(length * kQueries), *result = scratch.take(kQueries * wide);
  A *largest = scratch.take(kQueries), *sum = scratch.take(kQueries);
  copy_rows(head.key, head.stride, length, head_dim, A(1), key, wide);
  copy_rows(head.value, head.stride, length, head_dim, A(1), value, wide);
  for (int64_t first = 0; first < length; first += kQueries) {
    const int64_t rows = std::min(kQueries, length - first), queries = round_up(rows, kPanel<A>);
    copy_rows(head.query + first * head.stride, head.stride, rows, head_dim, A(heads.scale), query, wide);
    transpose(query, wide, rows, head_dim, query_columns);
    multiply<A>(length, queries, head_dim, {key, wide, 1}, query_columns, kQueries, false, scores, kQueries);
    exponentiate(scores, length, queries, largest, sum);
    multiply<A>(rows, wide, length, {scores, 1, kQueries}, value, wide, false, result, wide);
    for (int64_t row = 0; row < rows; ++row) {
      logsumexp[(first + row) * heads.heads] = largest[row] + std::log(sum[row]);
      sum[row] = 1 / sum[row];
    }
    write_rows(result, wide, rows, head_dim, A(1), sum, out + first * heads.heads * head_dim,
               heads.heads * head_dim);
  }
}

// As forward_scratch, for `attend_backward`.
template <typename A>
int64_t backward_scratch(const Heads& heads, int64_t length) {
  const int64_t wide = round_up(heads.head_dim, kPanel<A>);
  return 4 * length * wide + kQueries * (5 * wide + 2 * length + 2);
}

// The gradient of one head of qkv, at `grad_qkv` and in rows as far apart as those of the head.
//
// All scores of a query are at hand, and their largest and sum are found anew: a logsumexp is rounded, and
// all probabilities of large scores with it; and its own scores may have been summed in another order.
template <typename T, typename A>
void attend_backward(const Heads& heads, const Head<T>& head, Scratch<A>& scratch, const T* grad,
                     T* grad_qkv) {
  const int64_t head_dim = heads.head_dim, length = head.length, width = heads.heads * head_dim;
  const int64_t wide = round_up(head_dim, kPanel<A>);
  scratch.start();
  A *key = scratch.take(length * wide), *value = scratch.take(length * wide);
  A *grad_key = scratch.take(length * wide), *grad_value = scratch.take(length * wide);
  A *query = scratch.take(kQueries * wide), *query_columns = scratch.take(kQueries * wide);
  A *grad_out = scratch.take(kQueries * wide), *grad_out_columns = scratch.take(kQueries * wide);
  A *grad_query = scratch.take(kQueries * wide), *largest = scratch.take(kQueries),
    *sum = scratch.take(kQueries);
  A *scores = scratch.take(length * kQueries), *grad_scores = scratch.take(length * kQueries);
  copy_rows(head.key, head.stride, length, head_dim, A(1), key, wide);
  copy_rows(head.value, head.stride, length, head_dim, A(1), value, wide);
  for (int64_t first = 0; first < length; first += kQueries) {
    const int64_t rows = std::min(kQueries, length - first), queries = round_up(rows, kPanel<A>);
    const bool add = first > 0;
    copy_rows(head.query + first * head.stride, head.stride, rows, head_dim, A(heads.scale), query, wide);
    copy_rows(grad + first * width, width, rows, head_dim, A(1), grad_out, wide);
    transpose(query, wide, rows, head_dim, query_columns);
    transpose(grad_out, wide, rows, head_dim, grad_out_columns);
    multiply<A>(length, queries, head_dim, {key, wide, 1}, query_columns, kQueries, false, scores, kQueries);
    multiply<A>(length, queries, head_dim, {value, wide, 1}, grad_out_columns, kQueries, false, grad_scores,
                kQueries);
    exponentiate(scores, length, queries, largest, sum);
    differentiate(scores, sum, grad_scores, length, queries);
    multiply<A>(rows, wide, length, {grad_scores, 1, kQueries}, key, wide, false, grad_query, wide);
    multiply<A>(length, wide, rows, {grad_scores, kQueries, 1}, query, wide, add, grad_key, wide);
    multiply<A>(length, wide, rows, {scores, kQueries, 1}, grad_out, wide, add, grad_value, wide);
    write_rows<T, A>(grad_query, wide, rows, head_dim, A(heads.scale), nullptr,
                     grad_qkv + first * head.stride, head.stride);
  }
  write_rows<T, A>(grad_key, wide, length, head_dim, A(1), nullptr, grad_qkv + width, head.stride);
  write_rows<T, A>(grad_value, wide, length, head_dim, A(1), nullptr, grad_qkv + 2 * width, head.stride);
}

// Calls body(scratch, sequence, head) for every pair, each thread a range of about the same work.
template <typename A, typename Body>
void parallel_for_heads(const Heads& heads, const Tensor& cu_seqlens, int64_t scratch_values, Body&& body) {
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t sequences = cu_seqlens.size(0) - 1;
  // About the cycles that all heads of the sequences before s take; each head has its share of them.
  std::vector<int64_t> work(sequences + 1, 0);
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = starts[s + 1] - starts[s];
    work[s + 1] = work[s] + heads.heads * (length * (length + 24) * (heads.head_dim + 16) / 8);
  }
  torch::stable::parallel_for(0, work[sequences], 32768, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(scratch_values);
    // A head belongs to the thread in whose range its own work begins. Empty sequences have none.
    int64_t s = std::upper_bound(work.begin(), work.end(), begin) - work.begin() - 1;
    for (; s < sequences && work[s] < end; ++s) {
      const int64_t share = (work[s + 1] - work[s]) / heads.heads;
      for (int64_t head = 0; share > 0 && head < heads.heads; ++head) {
        const int64_t at = work[s] + head * share;
        if (at >= begin && at < end) body(scratch, s, head);
      }
    }
  });
}

Heads make_heads(const char* op, const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                 double scale) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, op,
                  ": argument `qkv` must be (T, 3, heads, head_dim).");
  check_cu_seqlens(op, cu_seqlens, qkv.size(0));
  STD_TORCH_CHECK(longest(cu_seqlens) <= max_seqlen, op, ": argument `max_seqlen` must be at least ",
                  longest(cu_seqlens), ", the longest sequence, but it is ", max_seqlen, ".");
  return {qkv.size(2), qkv.size(3), scale};
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                                            double scale) {
  const Tensor rows = torch::stable::contiguous(qkv), boundaries = torch::stable::contiguous(cu_seqlens);
  const Heads heads = make_heads("packed_attention", rows, boundaries, max_seqlen, scale);
  const ScalarType precise = qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::empty({qkv.size(0), heads.heads, heads.head_dim}, qkv.scalar_type());
  Tensor logsumexp = torch::stable::empty({qkv.size(0), heads.heads}, precise);
  use_huge_pages(out);
  const int32_t* starts = boundaries.const_data_ptr<int32_t>();
  const int64_t sequences = boundaries.size(0) - 1, width = heads.heads * heads.head_dim;
  dispatch_floating(qkv.scalar_type(), "packed_attention", [&]<typename T>() {
    using A = accumulate_t<T>;
    const T* from = rows.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    A* sums = logsumexp.mutable_data_ptr<A>();
    const bool in_pairs = std::is_same_v<T, BFloat16> && multiplies_bf16(heads);
    const int64_t length = longest(boundaries);
    const int64_t scratch = in_pairs ? bf16_scratch(heads, length) : forward_scratch<A>(heads, length);
    parallel_for_heads<A>(heads, boundaries, scratch, [&](Scratch<A>& memory, int64_t s, int64_t head) {
      const int64_t at = starts[s] * heads.heads + head;
      prefetch_next(from, 3 * width, starts, sequences, s, head, heads.heads);
      const Head<T> source = make_head(heads, from, starts, s, head);
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (in_pairs) return attend_bf16(heads, source, memory, to + at * heads.head_dim, sums + at);
      }
      attend(heads, source, memory, to + at * heads.head_dim, sums + at);
    });
  });
  return {out, logsumexp};
}

Tensor packed_attention_backward(const Tensor& grad, const Tensor& qkv, const Tensor& cu_seqlens,
                                 int64_t max_seqlen, const Tensor& logsumexp, double scale) {
  const Tensor rows = torch::stable::contiguous(qkv), boundaries = torch::stable::contiguous(cu_seqlens);
  const Tensor grad_out = torch::stable::contiguous(grad);
  const Heads heads = make_heads("packed_attention_backward", rows, boundaries, max_seqlen, scale);
  STD_TORCH_CHECK(3 * grad.numel() == qkv.numel() && logsumexp.numel() == qkv.size(0) * heads.heads,
                  "packed_attention_backward: `grad` and `logsumexp` must fit `qkv`.");
  Tensor out = torch::stable::empty({qkv.size(0), 3, heads.heads, heads.head_dim}, qkv.scalar_type());
  use_huge_pages(out);
  const int32_t* starts = boundaries.const_data_ptr<int32_t>();
  const int64_t sequences = boundaries.size(0) - 1, width = heads.heads * heads.head_dim;
  dispatch_floating(qkv.scalar_type(), "packed_attention_backward", [&]<typename T>() {
    using A = accumulate_t<T>;
    const T *from = rows.const_data_ptr<T>(), *grad_from = grad_out.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t scratch = backward_scratch<A>(heads, longest(boundaries));
    parallel_for_heads<A>(heads, boundaries, scratch, [&](Scratch<A>& memory, int64_t s, int64_t head) {
      prefetch_next(from, 3 * width, starts, sequences, s, head, heads.heads);
      prefetch_next(grad_from, width, starts, sequences, s, head, heads.heads);
      const Head<T> source = make_head(heads, from, starts, s, head);
      const int64_t at = starts[s] * heads.heads + head;
      attend_backward<T, A>(heads, source, memory, grad_from + at * heads.head_dim,
                            to + (source.query - from));
    });
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&fastshap::packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&fastshap::packed_attention_backward));
}
