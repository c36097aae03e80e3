// rademacher and hutchinson_trace on the CPU. Signs are made 128 at a time (the layout of
// lwkd/reference/hutchinson.py): element e of tensor i takes bit s % 32 of word s / 32 of philox(seed; tile * K + j, i,
// 0, 0), where K = 512, tile = e / 128K, plane s = e % 128K / K, column j = e % K. So a plane of K neighbours takes one
// bit of K neighbouring words, and sign bits are set by whole vectors. The trace makes the signs again and never reads
// the probe.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "../memory_layout.h"
#include "dtypes.h"
#include "huge_pages.h"
#include "philox.h"
#include "work_queue.h"

namespace lwkd {

// A tile of one tensor: all elements whose signs come from one run of counters.
struct SignTile {
  uint64_t seed;
  uint32_t tensor, tile;
  int64_t count;  // elements, at most kTile
};

namespace {

constexpr int kPlane = 512, kPlanesPerWord = 32, kWords = 4;
constexpr int64_t kTile = int64_t{kPlane} * kPlanesPerWord * kWords;
constexpr uint32_t kSignBit = 0x80000000u;

template <class To, class From>
LWKD_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// How a dtype holds 1 and its sign, and how it is summed.
template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  using Acc = float;
  static constexpr Bits kOne = 0x3F800000;
};
template <>
struct Format<c10::Half> {
  using Bits = uint16_t;
  using Acc = float;
  static constexpr Bits kOne = 0x3C00;
};
template <>
struct Format<c10::BFloat16> {
  using Bits = uint16_t;
  using Acc = float;
  static constexpr Bits kOne = 0x3F80;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  using Acc = double;
  static constexpr Bits kOne = 0x3FF0000000000000;
};

// The sign in the highest bit of a word, moved to the highest bit of another width.
template <class Bits>
LWKD_INLINE Bits sign_in(uint32_t sign) {
  if constexpr (sizeof(Bits) > sizeof(sign)) return Bits{sign} << 32;
  return static_cast<Bits>(sign >> (32 - 8 * std::min(sizeof(Bits), sizeof(sign))));
}

// Columns that a tile uses, rounded up to a power of two and a whole vector; all K in any tile of K elements or more.
LWKD_INLINE int columns_of(int64_t count) {
  int columns = kPlane;
  while (columns > 16 && columns / 2 >= count) columns /= 2;
  return columns;
}

LWKD_INLINE void words_of(const SignTile& tile, int columns, uint32_t* words) {
  philox_words(tile.seed, tile.tile * kPlane, tile.tensor, columns, kPlane, words);
}

template <class T>
LWKD_INLINE void write_plane(typename Format<T>::Bits* __restrict out, const uint32_t* __restrict words, int bit,
                             int width) {
  using Bits = typename Format<T>::Bits;
  for (int j = 0; j < width; ++j) out[j] = Format<T>::kOne | sign_in<Bits>(words[j] << (31 - bit) & kSignBit);
}

template <class T>
LWKD_INLINE void write_tile(const SignTile& tile, void* probe) {
  alignas(64) uint32_t words[kWords * kPlane];
  words_of(tile, columns_of(tile.count), words);
  auto* out = static_cast<typename Format<T>::Bits*>(probe);
  int plane = 0;
  for (int64_t begin = 0; begin < tile.count; begin += kPlane, ++plane) {
    const int width = static_cast<int>(std::min<int64_t>(kPlane, tile.count - begin));
    write_plane<T>(out + begin, words + plane / kPlanesPerWord * kPlane, plane % kPlanesPerWord, width);
  }
}

template <class T, class Acc>
LWKD_INLINE void add_plane(const T* __restrict product, const uint32_t* __restrict words, int bit, int width,
                           Acc* __restrict sums) {
  using Bits = typename Format<Acc>::Bits;
  for (int j = 0; j < width; ++j) {
    const Bits sign = sign_in<Bits>(words[j] << (31 - bit) & kSignBit);
    sums[j] += bits_of<Acc>(static_cast<Bits>(bits_of<Bits>(Acc(product[j])) ^ sign));
  }
}

// Elements fetched ahead. In half precision so much is computed for each byte that the processor does not fetch ahead
// by itself; in float32 it hides the time in which the words are made; in float64 it only costs.
template <class T>
constexpr int64_t kAhead = sizeof(T) < sizeof(double) ? 8192 / sizeof(T) : 0;

template <class T>
LWKD_INLINE void prefetch(const T* product, int64_t begin, int64_t end) {
  const char* first = reinterpret_cast<const char*>(product + begin);
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(T));
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(first + byte, 0, 2);
}

// Each column is summed over the 32 planes of a word in float32, from there on in float64.
template <class T>
LWKD_INLINE double sum_tile(const SignTile& tile, const void* products) {
  using Acc = typename Format<T>::Acc;
  alignas(64) uint32_t words[kWords * kPlane];
  alignas(64) Acc sums[kPlane];
  alignas(64) double columns[kPlane];
  const T* product = static_cast<const T*>(products);
  prefetch(product, 0, std::min(kAhead<T>, tile.count));
  int width = columns_of(tile.count);
  words_of(tile, width, words);
  std::fill_n(columns, width, 0.0);
  int64_t begin = 0;
  for (int word = 0; word < kWords && begin < tile.count; ++word) {
    std::fill_n(sums, width, Acc(0));
    for (int bit = 0; bit < kPlanesPerWord && begin < tile.count; ++bit, begin += kPlane) {
      const int plane_width = static_cast<int>(std::min<int64_t>(kPlane, tile.count - begin));
      if (kAhead<T> > 0) prefetch(product, begin + kAhead<T>, std::min(begin + kAhead<T> + kPlane, tile.count));
      add_plane<T, Acc>(product + begin, words + word * kPlane, bit, plane_width, sums);
    }
    for (int j = 0; j < width; ++j) columns[j] += sums[j];
  }
  while (width > 1) {
    width /= 2;
    for (int j = 0; j < width; ++j) columns[j] += columns[width + j];
  }
  return columns[0];
}

}  // namespace

LWKD_MULTIVERSION void write_signs(at::ScalarType dtype, const SignTile& tile, void* probe) {
  if (dtype == at::kFloat) return write_tile<float>(tile, probe);
  if (dtype == at::kHalf) return write_tile<c10::Half>(tile, probe);
  if (dtype == at::kBFloat16) return write_tile<c10::BFloat16>(tile, probe);
  write_tile<double>(tile, probe);
}

LWKD_MULTIVERSION double sum_with_signs(at::ScalarType dtype, const SignTile& tile, const void* product) {
  if (dtype == at::kFloat) return sum_tile<float>(tile, product);
  if (dtype == at::kHalf) return sum_tile<c10::Half>(tile, product);
  if (dtype == at::kBFloat16) return sum_tile<c10::BFloat16>(tile, product);
  return sum_tile<double>(tile, product);
}

namespace {

// The tiles of all tensors, tensor by tensor, and the bytes that they cover.
struct Tiles {
  std::vector<SignTile> tiles;
  int64_t bytes = 0;

  Tiles(at::TensorList tensors, int64_t seed) {
    tiles.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const int64_t count = tensors[i].numel();
      bytes += static_cast<int64_t>(tensors[i].nbytes());
      for (int64_t begin = 0; begin < count; begin += kTile)
        tiles.push_back({static_cast<uint64_t>(seed), static_cast<uint32_t>(i), static_cast<uint32_t>(begin / kTile),
                         std::min(kTile, count - begin)});
    }
  }

  // item(index, tile, where the tile begins in its tensor, in bytes)
  template <class Item>
  void run(at::TensorList tensors, const Item& item) const {
    run_items(static_cast<int64_t>(tiles.size()), bytes, [&](int64_t index) {
      const SignTile& tile = tiles[index];
      item(index, tile, tile.tile * kTile * static_cast<int64_t>(tensors[tile.tensor].element_size()));
    });
  }
};

std::vector<at::Tensor> rademacher_cpu(at::TensorList like,  // any shapes
                                       int64_t seed) {
  std::vector<at::Tensor> probes;
  probes.reserve(like.size());
  for (size_t i = 0; i < like.size(); ++i) {
    checks::floating(checks::at_tensor("rademacher", "tensor", i), like[i]);
    probes.push_back(empty_contiguous(like[i]));
    prefer_huge_pages(probes.back());
  }
  Tiles(probes, seed).run(probes, [&](int64_t, const SignTile& tile, int64_t offset) {
    const at::Tensor& probe = probes[tile.tensor];
    write_signs(probe.scalar_type(), tile, static_cast<char*>(probe.mutable_data_ptr()) + offset);
  });
  return probes;
}

at::Tensor hutchinson_trace_cpu(at::TensorList products,   // any shapes
                                at::IntArrayRef layer_of,  // (products,)
                                int64_t seed, int64_t layers) {
  checks::layer_indices(static_cast<int64_t>(products.size()), layer_of, layers);
  std::vector<at::Tensor> contiguous;
  contiguous.reserve(products.size());
  at::ScalarType dtype = at::kFloat;
  for (size_t i = 0; i < products.size(); ++i) {
    checks::floating(checks::at_tensor("hutchinson_trace", "product", i), products[i]);
    contiguous.push_back(products[i].contiguous());
    if (products[i].scalar_type() == at::kDouble) dtype = at::kDouble;
  }
  const Tiles all(contiguous, seed);
  std::vector<double> sums(all.tiles.size()), traces(layers);
  all.run(contiguous, [&](int64_t index, const SignTile& tile, int64_t offset) {
    const at::Tensor& product = contiguous[tile.tensor];
    sums[index] =
        sum_with_signs(product.scalar_type(), tile, static_cast<const char*>(product.const_data_ptr()) + offset);
  });
  // Second stage, in the order of the list: first each tensor's own sum, so that it does not depend on the grouping.
  for (size_t index = 0; index < sums.size();) {
    const uint32_t tensor = all.tiles[index].tensor;
    double sum = 0;
    for (; index < sums.size() && all.tiles[index].tensor == tensor; ++index) sum += sums[index];
    traces[layer_of[tensor]] += sum;
  }
  return as_tensor(traces, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("rademacher", rademacher_cpu);
  m.impl("hutchinson_trace", hutchinson_trace_cpu);
}

}  // namespace lwkd
