// What this machine needs for the unavoidable parts of detr-encoder in float32: loops that do one
// part each and nothing else. Arithmetic on rows in the first-level cache and traffic with memory
// can overlap at best: the larger of the two is a floor under a kernel's time, however it is
// written.
//
// Usage: floors THREADS REPEATS; prints "name milliseconds" lines, the least of the repeats (a
// thread's start, some 0.05 ms, is in each).

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kQueries = 22223, kHeads = 8, kHeadDim = 32, kPoints = 16;
constexpr int64_t kPointsOfHead = kQueries * kPoints;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float V __attribute__((vector_size(kWidth * 4), may_alias, aligned(4)));
constexpr int kVectors = kHeadDim / kWidth;  // of a row

V load(const float* from) { return *reinterpret_cast<const V*>(from); }
void store(float* to, V v) { *reinterpret_cast<V*>(to) = v; }
void stream(float* to, V v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<V*>(to));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(to, v);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(to, v);
#else
  store(to, v);
#endif
}
// As if the vector were used.
void keep(V value) { asm volatile("" : : "x"(value)); }

float* numbers(int64_t count) {
  float* data = static_cast<float*>(std::aligned_alloc(4096, (count * 4 + 4095) / 4096 * 4096));
  for (int64_t i = 0; i < count; ++i) data[i] = static_cast<float>(i % 251) / 251 + 0.1f;
  return data;
}

// Rows and weights that stay in the first-level cache: where the loads point does not matter.
struct Cached {
  float* rows = numbers(1 << 12);
  float* weights = numbers(1 << 10);
  int32_t order[64];
  Cached() {
    for (int32_t i = 0; i < 64; ++i) order[i] = i * 37 % 60 * static_cast<int32_t>(kHeadDim);
  }
  const float* row(int64_t i) const { return rows + order[i & 63]; }
};

// A number of a quad in all lanes; the quad is loaded once for all four.
template <int Lane>
V spread(V quads) {
#if defined(__AVX512F__)
  return V(__builtin_shufflevector(quads, quads, Lane, Lane, Lane, Lane, Lane + 4, Lane + 4,
                                   Lane + 4, Lane + 4, Lane + 8, Lane + 8, Lane + 8, Lane + 8,
                                   Lane + 12, Lane + 12, Lane + 12, Lane + 12));
#elif defined(__AVX2__)
  return V(__builtin_shufflevector(quads, quads, Lane, Lane, Lane, Lane, Lane + 4, Lane + 4,
                                   Lane + 4, Lane + 4));
#else
  return V(__builtin_shufflevector(quads, quads, Lane, Lane, Lane, Lane));
#endif
}

// The rows of a head as a model reads them: around each query's own cell, with a Gaussian of 4
// pixels, 256 queries at a time, level after level. Upper and lower left corners, in numbers.
struct Neighbourhoods {
  float* rows = numbers((kQueries + 1) * kHeadDim);
  std::vector<int32_t> upper, lower;

  Neighbourhoods() {
    struct Level {
      int32_t height, width, first;
    };
    const Level levels[] = {{100, 167, 0}, {50, 84, 16700}, {25, 42, 20900}, {13, 21, 21950}};
    std::mt19937 generator(0);
    std::normal_distribution<float> pixels(0, 4);
    std::vector<float> x, y;
    for (const Level& level : levels)
      for (int32_t cell = 0; cell < level.height * level.width; ++cell) {
        x.push_back((cell % level.width + 0.5f) / level.width);
        y.push_back((cell / level.width + 0.5f) / level.height);
      }
    const auto clamp = [](float pixel, int32_t size) {
      return std::min(std::max(static_cast<int32_t>(pixel), 0), size - 2);
    };
    for (int64_t first = 0; first < kQueries; first += 256)
      for (const Level& level : levels)
        for (int64_t q = first; q < std::min(first + 256, kQueries); ++q)
          for (int64_t k = 0; k < kPoints / 4; ++k) {
            const int32_t column = clamp(x[q] * level.width + pixels(generator), level.width);
            const int32_t line = clamp(y[q] * level.height + pixels(generator), level.height);
            const int32_t row = level.first + line * level.width + column;
            upper.push_back(row * static_cast<int32_t>(kHeadDim));
            lower.push_back((row + level.width) * static_cast<int32_t>(kHeadDim));
          }
  }
};

// Four rows of each point multiplied with its weights and added up: the blend of one head, and its
// dot products. `row(point, corner)` says where they are; the weights are quads repeated to a
// vector.
template <class Row>
void add_rows(const Cached& cached, Row row) {
  V sums[4][kVectors] = {};
  for (int64_t i = 0; i < kPointsOfHead; ++i) {
    const V quads = load(cached.weights + (i & 31) * kWidth);
    const V w[4] = {spread<0>(quads), spread<1>(quads), spread<2>(quads), spread<3>(quads)};
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sums[corner][v] += load(row(i, corner) + v * kWidth) * w[corner];
  }
  for (auto& of_corner : sums)
    for (const V sum : of_corner) keep(sum);
}

// A head's part of a tensor [Q, M, numbers]: read, or written past the caches.
void read_strided(const float* from, int64_t count, int64_t head) {
  V sum = {};
  for (int64_t q = 0; q < kQueries; ++q) {
    const float* at = from + (q * kHeads + head) * count;
    for (int64_t i = 0; i < count; i += kWidth) {
      __builtin_prefetch(at + 16 * kHeads * count + i, 0, 2);
      sum += load(at + i);
    }
  }
  keep(sum);
}
void write_strided(float* to, int64_t count, int64_t head) {
  const V one = V{} + 1.0f;
  for (int64_t q = 0; q < kQueries; ++q)
    for (int64_t i = 0; i < count; i += kWidth) stream(to + (q * kHeads + head) * count + i, one);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 9;
  const int64_t whole = kQueries * kHeads * kHeadDim, points = kQueries * kHeads * kPoints;
  // Room for what is fetched ahead of the last query.
  constexpr int64_t kRoom = 1 << 16;
  float *value = numbers(whole + kRoom), *grad = numbers(whole + kRoom), *output = numbers(whole);
  float *locations = numbers(2 * points + kRoom), *grad_locations = numbers(2 * points);
  float *weights = numbers(points + kRoom), *grad_weights = numbers(points);
  std::vector<Cached> cached(threads);

  // Each thread takes its heads.
  const auto time = [&](const char* name, std::function<void(int, int64_t)> part) {
    double least = 1e9;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      const auto begin = std::chrono::steady_clock::now();
      std::vector<std::thread> running;
      for (int i = 0; i < threads; ++i)
        running.emplace_back([&, i] {
          for (int64_t head = i; head < kHeads; head += threads) part(i, head);
        });
      for (std::thread& one : running) one.join();
      const std::chrono::duration<double, std::milli> took =
          std::chrono::steady_clock::now() - begin;
      least = std::min(least, took.count());
    }
    std::printf("%s %.3f\n", name, least);
  };
  time("row_loads", [&](int i, int64_t) {
    const Cached& from = cached[i];
    add_rows(from, [&](int64_t point, int corner) { return from.row(point) + corner * kHeadDim; });
  });
  const Neighbourhoods near;
  time("neighbourhoods", [&](int i, int64_t) {
    add_rows(cached[i], [&](int64_t point, int corner) {
      return near.rows + (corner < 2 ? near.upper : near.lower)[point] + corner % 2 * kHeadDim;
    });
  });
  // One row four times: the scatter of grad_output where every point shares its cell with many.
  time("cell_sums", [&](int i, int64_t) {
    const Cached& from = cached[i];
    add_rows(from, [&](int64_t point, int) { return from.row(point); });
  });
  time("read_points", [&](int, int64_t head) {
    read_strided(locations, 2 * kPoints, head);
    read_strided(weights, kPoints, head);
  });
  time("read_value", [&](int, int64_t head) { read_strided(value, kHeadDim, head); });
  time("read_grad_output", [&](int, int64_t head) { read_strided(grad, kHeadDim, head); });
  time("write_output", [&](int, int64_t head) { write_strided(output, kHeadDim, head); });
  time("write_grad_points", [&](int, int64_t head) {
    write_strided(grad_locations, 2 * kPoints, head);
    write_strided(grad_weights, kPoints, head);
  });
  // The system's part: fresh memory for the results, in large pages, touched for the first time and
  // given back. A thread takes the heads' shares of it.
  time("fresh_memory", [&](int, int64_t) {
    constexpr int64_t kHugePage = int64_t(1) << 21;
    const int64_t bytes = (2 * whole + 3 * points) * 4 / kHeads / kHugePage * kHugePage + kHugePage;
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return;
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    for (int64_t at = 0; at < bytes; at += 4096) static_cast<volatile char*>(data)[at] = 1;
    munmap(data, bytes);
  });
}
