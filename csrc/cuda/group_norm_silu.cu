// The forward pass of GroupNorm, with SiLU or without, for images that one block cannot hold.
//
//     y = f(weight * (x - mean) / sqrt(var + eps) + bias)     Wu & He 2018, Eq. 1, 2, 6 and 7
//
// x is [images, pixels, channels]. An image is cut into slices of whole groups of channels, and a
// slice into tiles of pixels. A block keeps a tile in shared memory and computes, for each channel,
// the mean over its pixels and the squares about that mean. Those of all tiles of a slice are
// merged to the statistics of groups, always in one order (Chan et al. 1979, STAN-CS-79-773, Eq.
// 2.1).
//
// Cluster (sm_90): the blocks of a slice are a cluster. Each reads the results of the others
// through distributed shared memory, so x is read once: traffic 2, x and y, in elements for each
// element. Two passes (sm_80): results go from one kernel to the next through a table in global
// memory, and x is read twice: traffic 3.
//
// No atomics; how an image is cut depends on its shape alone, and so do the bits of the result.
// Not measured yet.
#include "launch.cuh"

namespace ds {
namespace {

constexpr int64_t kWidestSlice = 128;  // channels
// Bytes of a pixel in a slice: at least one sector of memory, better two.
constexpr int64_t kSector = 32, kSegment = 64;
// Shared memory of a block: room for three, two, or one on a multiprocessor of sm_90; and what
// every GPU has.
constexpr int64_t kRooms[] = {74 * 1024, 112 * 1024, 227 * 1024};
constexpr int64_t kPortableRoom = 48 * 1024;

// How an image is cut; tiles is 0 if it cannot be.
struct Cut {
  int64_t pixels, channels, groups, per_group;
  int64_t slices, slice_groups;  // of an image; of a slice
  int64_t tiles, tile_pixels;    // of a slice; of a tile
  size_t shared;

  HOST_DEVICE int rows(int64_t tile) const {
    const int64_t left = pixels - tile * tile_pixels;
    return static_cast<int>(left < 0 ? 0 : left < tile_pixels ? left : tile_pixels);
  }
};

// What the threads of a block share, in front of the tile: a float for each channel, and sums.
struct Shared {
  float *mean, *squares;         // over the tile; the other blocks of the cluster read them
  float *sum, *centre, *spread;  // over the slice
  float *scale, *shift;
  float *lanes, *parts;  // sums on the way
  char* tile;

  static constexpr int kVector = 8;  // channels, at most
  static constexpr int64_t kBytes = sizeof(float) * (7 * kWidestSlice + (kVector + 1) * kThreads);

  HOST_DEVICE explicit Shared(char* memory) {
    float* next = reinterpret_cast<float*>(memory);
    for (float** array : {&mean, &squares, &sum, &centre, &spread, &scale, &shift}) {
      *array = next;
      next += kWidestSlice;
    }
    lanes = next;
    parts = lanes + kVector * kThreads;
    tile = memory + kBytes;
  }
};

Cut cut_tiles(int64_t pixels, int64_t channels, int64_t groups, int64_t size, bool cluster) {
  Cut cut = {pixels, channels, groups, channels / groups};
  const int64_t group_bytes = cut.per_group * size;
  if (channels * size % 16 != 0 || cut.per_group > kWidestSlice) return cut;
  for (int64_t segment : {kSegment, kSector}) {
    // The narrowest slice that is as wide as the segment and made of whole sectors or vectors.
    int64_t taken = 0;
    for (int64_t alignment : {kSector, int64_t{16}}) {
      for (taken = 1; taken < groups; ++taken) {
        if (taken * group_bytes >= segment && taken * group_bytes % alignment == 0) break;
      }
      if (taken * cut.per_group <= kWidestSlice) break;
    }
    const int64_t row = taken * group_bytes;
    if (taken * cut.per_group > kWidestSlice) continue;
    cut.slice_groups = taken;
    cut.slices = (groups + taken - 1) / taken;
    if (!cluster) {
      cut.tile_pixels = std::min(pixels, (kPortableRoom - Shared::kBytes) / row);
      cut.tiles = (pixels + cut.tile_pixels - 1) / cut.tile_pixels;
      cut.shared = Shared::kBytes + cut.tile_pixels * row;
      return cut;
    }
    for (int64_t room : kRooms) {
      for (int64_t tiles = 1; tiles <= kLargestCluster; tiles *= 2) {
        cut.tile_pixels = (pixels + tiles - 1) / tiles;
        cut.shared = Shared::kBytes + cut.tile_pixels * row;
        if (static_cast<int64_t>(cut.shared) <= room) {
          cut.tiles = tiles;
          return cut;
        }
      }
    }
  }
  return cut;
}

struct Parameter {
  const void* values;
  Type type;

  HOST_DEVICE float operator[](int64_t channel) const {
    if (type == kFloat16) return widen(static_cast<const __half*>(values)[channel]);
    if (type == kBfloat16) return widen(static_cast<const __nv_bfloat16*>(values)[channel]);
    return static_cast<const float*>(values)[channel];
  }
};

HOST_DEVICE float silu(float z) {
#ifdef __CUDA_ARCH__
  return z * __fdividef(1.0f, 1.0f + __expf(-z));
#else
  return z / (1.0f + std::exp(-z));
#endif
}

// A slice of an image: what a cluster works on, or a tile of it.
struct Slice {
  int64_t image, first_group, first_channel;
  int64_t first_tile;  // that of the block of rank 0
  int width;

  HOST_DEVICE Slice(const Cut& cut, int64_t image, int64_t tile, int64_t slice)
      : image(image),
        first_group(slice * cut.slice_groups),
        first_channel(first_group * cut.per_group),
        first_tile(tile) {
    const int64_t left = cut.groups - first_group;
    width = static_cast<int>((left < cut.slice_groups ? left : cut.slice_groups) * cut.per_group);
  }
};

// The part of a thread in a tile: one vector of channels of every lanes-th row.
template <class T>
struct Part {
  static constexpr int kSize = Vector<T>::kSize;
  int column, lane, lanes, rows;
  int64_t start, step;

  HOST_DEVICE Part(const Cut& cut, const Slice& slice, const Block& block, int thread) {
    const int vectors = slice.width / kSize;
    const int64_t tile = slice.first_tile + block.rank;
    column = thread % vectors * kSize;
    lane = thread / vectors;
    lanes = kThreads / vectors;
    rows = lane < lanes ? cut.rows(tile) : 0;
    start = (slice.image * cut.pixels + tile * cut.tile_pixels) * cut.channels +
            slice.first_channel + column;
    step = cut.channels;
  }

  // Calls visit(row of the tile, where its vector starts in x) for each of them.
  template <class Visit>
  HOST_DEVICE void for_rows(Visit visit) const {
#pragma unroll 4
    for (int row = lane; row < rows; row += lanes) visit(row, start + row * step);
  }
};

// total(shared, channel, sum of value(block, shared, i, channel) over i < count), for every channel
// of a slice. Every parts-th thread sums for the same channel, and one of them sums what they have.
template <class Cluster, class Value, class Total>
HOST_DEVICE void sum_channels(Cluster& cluster, int width, int64_t count, Value value,
                              Total total) {
  const int parts = kThreads / width;
  cluster.phase([&](const Block& block, int thread) {
    const Shared shared(block.shared);
    const int channel = thread % width;
    float sum = 0.0f;
    for (int64_t i = thread / width; i < count; i += parts) {
      sum += value(block, shared, i, channel);
    }
    shared.parts[thread] = sum;
  });
  cluster.phase([&](const Block& block, int thread) {
    if (thread >= width) return;
    const Shared shared(block.shared);
    float sum = 0.0f;
    for (int part = 0; part < parts; ++part) sum += shared.parts[part * width + thread];
    total(block, shared, thread, sum);
  });
}

// Sums term(x, shared, channel) over the pixels of a tile, for every channel: over the rows of a
// thread, then over threads. fetch(part, tile) is called first.
template <class T, class Cluster, class Fetch, class Term, class Total>
HOST_DEVICE void sum_tile(Cluster& cluster, const Cut& cut, const Slice& slice, Fetch fetch,
                          Term term, Total total) {
  constexpr int kSize = Vector<T>::kSize;
  const int width = slice.width;
  cluster.phase([&](const Block& block, int thread) {
    const Shared shared(block.shared);
    const Part<T> part(cut, slice, block, thread);
    fetch(part, reinterpret_cast<T*>(shared.tile));
    float sums[kSize] = {};
    part.for_rows([&](int row, int64_t) {
      const auto x = load<Vector<T>>(reinterpret_cast<T*>(shared.tile) + row * width + part.column);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        sums[k] += term(widen(x.values[k]), shared, part.column + k);
      }
    });
    if (part.lane >= part.lanes) return;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      shared.lanes[part.lane * width + part.column + k] = sums[k];
    }
  });
  sum_channels(
      cluster, width, kThreads / (width / kSize),
      [&](const Block&, const Shared& shared, int64_t lane, int channel) {
        return shared.lanes[lane * width + channel];
      },
      total);
}

// Reads the tile of each block, and leaves its mean and its squares about it in shared memory.
template <class T, class Cluster>
HOST_DEVICE void read_tile(Cluster& cluster, const Cut& cut, const Slice& slice, const T* x) {
  sum_tile<T>(
      cluster, cut, slice,
      [&](const Part<T>& part, T* tile) {
        part.for_rows([&](int row, int64_t at) {
          copy_vector(tile + row * slice.width + part.column, x + at);
        });
        wait_for_copies();
      },
      [](float x, const Shared&, int) { return x; },
      [&](const Block& block, const Shared& shared, int channel, float sum) {
        const int rows = cut.rows(slice.first_tile + block.rank);
        shared.mean[channel] = rows > 0 ? sum / static_cast<float>(rows) : 0.0f;
      });
  sum_tile<T>(
      cluster, cut, slice, [](const Part<T>&, T*) {},
      [](float x, const Shared& shared, int channel) {
        const float centred = x - shared.mean[channel];
        return centred * centred;
      },
      [](const Block&, const Shared& shared, int channel, float sum) {
        shared.squares[channel] = sum;
      });
}

// The arguments of every kernel here.
template <class T>
struct Arguments {
  Cut cut;
  const T* x;
  Parameter weight, bias;
  int64_t affine_stride;  // from an image's row of parameters to the next; 0 for one row of all
  T* y;
  float *mean, *rstd;
  float* table;  // [images, tiles, 2, channels]: mean and squares
  float eps;
  bool activate;

  HOST_DEVICE float* row(const Slice& slice, int64_t tile) const {
    return table + (slice.image * cut.tiles + tile) * 2 * cut.channels + slice.first_channel;
  }
};

HOST_DEVICE float sum_group(const Cut& cut, const float* values, int channel) {
  const int64_t first = channel - channel % cut.per_group;
  float sum = 0.0f;
  for (int64_t c = first; c < first + cut.per_group; ++c) sum += values[c];
  return sum;
}

// Merges tiles and channels to groups: mean_of(block, tile, channel) and squares_of likewise are
// those of a tile. Leaves centre, scale and shift of each channel in shared memory.
template <class T, class Cluster, class MeanOf, class SquaresOf>
HOST_DEVICE void merge_tiles(Cluster& cluster, const Arguments<T>& call, const Slice& slice,
                             MeanOf mean_of, SquaresOf squares_of) {
  const Cut& cut = call.cut;
  const float count = static_cast<float>(cut.pixels) * static_cast<float>(cut.per_group);
  sum_channels(
      cluster, slice.width, cut.tiles,
      [&](const Block& block, const Shared&, int64_t tile, int channel) {
        return static_cast<float>(cut.rows(tile)) * mean_of(block, tile, channel);
      },
      [](const Block&, const Shared& shared, int channel, float sum) {
        shared.sum[channel] = sum;
      });
  cluster.phase([&](const Block& block, int thread) {
    const Shared shared(block.shared);
    if (thread < slice.width) shared.centre[thread] = sum_group(cut, shared.sum, thread) / count;
  });
  sum_channels(
      cluster, slice.width, cut.tiles,
      [&](const Block& block, const Shared& shared, int64_t tile, int channel) {
        const float off = mean_of(block, tile, channel) - shared.centre[channel];
        return squares_of(block, tile, channel) + static_cast<float>(cut.rows(tile)) * off * off;
      },
      [](const Block&, const Shared& shared, int channel, float sum) {
        shared.spread[channel] = sum;
      });
  // No block may leave while others still read its shared memory.
  cluster.exchange([&](const Block& block, int thread) {
    if (thread >= slice.width) return;
    const Shared shared(block.shared);
    const float rstd = rsqrtf(sum_group(cut, shared.spread, thread) / count + call.eps);
    const int64_t channel = slice.first_channel + thread;
    const int64_t parameter = slice.image * call.affine_stride + channel;
    shared.scale[thread] = call.weight[parameter] * rstd;
    shared.shift[thread] = call.bias[parameter];
    if (slice.first_tile + block.rank == 0 && thread % cut.per_group == 0) {
      const int64_t group = slice.image * cut.groups + channel / cut.per_group;
      call.mean[group] = shared.centre[thread];
      call.rstd[group] = rstd;
    }
  });
}

// Writes y of each block's tile. The mean is taken off before scaling: folded into the shift, it
// would cost precision where it is large beside the standard deviation.
template <class T, class Cluster, class Load>
HOST_DEVICE void write_tile(Cluster& cluster, const Arguments<T>& call, const Slice& slice,
                            Load load) {
  cluster.phase([&](const Block& block, int thread) {
    constexpr int kSize = Vector<T>::kSize;
    const Shared shared(block.shared);
    const Part<T> part(call.cut, slice, block, thread);
    float centre[kSize], scale[kSize], shift[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      centre[k] = shared.centre[part.column + k];
      scale[k] = shared.scale[part.column + k];
      shift[k] = shared.shift[part.column + k];
    }
    part.for_rows([&](int row, int64_t at) {
      Vector<T> values = load(shared, row * slice.width + part.column, at);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const float z = (widen(values.values[k]) - centre[k]) * scale[k] + shift[k];
        narrow(call.activate ? silu(z) : z, values.values[k]);
      }
      store(values, call.y + at);
    });
  });
}

// One read of x: a cluster holds all tiles of a slice.
template <class T>
struct ClusterForward : Arguments<T> {
  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    const Cut& cut = this->cut;
    const Slice slice(cut, cluster.index() / cut.slices, 0, cluster.index() % cut.slices);
    read_tile(cluster, cut, slice, this->x);
    cluster.exchange([](const Block&, int) {});
    merge_tiles(
        cluster, *this, slice,
        [](const Block& block, int64_t tile, int channel) {
          return Shared(block.peer(static_cast<int>(tile))).mean[channel];
        },
        [](const Block& block, int64_t tile, int channel) {
          return Shared(block.peer(static_cast<int>(tile))).squares[channel];
        });
    write_tile(cluster, *this, slice, [](const Shared& shared, int64_t at_tile, int64_t) {
      return load<Vector<T>>(reinterpret_cast<const T*>(shared.tile) + at_tile);
    });
  }
};

// Two passes: the sums of every tile, then y of every tile.
template <class T>
struct Pass : Arguments<T> {
  HOST_DEVICE Slice slice(int64_t index) const {
    const int64_t tile = index / this->cut.slices;
    return Slice(this->cut, tile / this->cut.tiles, tile % this->cut.tiles,
                 index % this->cut.slices);
  }
};

template <class T>
struct SumsForward : Pass<T> {
  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    const Slice slice = this->slice(cluster.index());
    read_tile(cluster, this->cut, slice, this->x);
    cluster.phase([&](const Block& block, int thread) {
      if (thread >= slice.width) return;
      const Shared shared(block.shared);
      float* row = this->row(slice, slice.first_tile);
      row[thread] = shared.mean[thread];
      row[this->cut.channels + thread] = shared.squares[thread];
    });
  }
};

template <class T>
struct ApplyForward : Pass<T> {
  template <class Cluster>
  HOST_DEVICE void operator()(Cluster& cluster) const {
    const Slice slice = this->slice(cluster.index());
    merge_tiles(
        cluster, *this, slice,
        [&](const Block&, int64_t tile, int channel) { return this->row(slice, tile)[channel]; },
        [&](const Block&, int64_t tile, int channel) {
          return this->row(slice, tile)[this->cut.channels + channel];
        });
    write_tile(cluster, *this, slice, [&](const Shared&, int64_t, int64_t at) {
      return load<Vector<T>>(this->x + at);
    });
  }
};

template <class T>
const char* forward(const Cut& cut, const void* x, Parameter weight, Parameter bias,
                    int64_t affine_stride, void* y, float* mean, float* rstd, float* table,
                    int64_t images, float eps, bool activate, Place place) {
  const Arguments<T> call = {cut,  static_cast<const T*>(x), weight, bias, affine_stride,
                             static_cast<T*>(y), mean, rstd, table, eps, activate};
  if (table == nullptr) {
    return launch(ClusterForward<T>{call}, images * cut.slices, static_cast<int>(cut.tiles),
                  cut.shared, place);
  }
  const int64_t blocks = images * cut.tiles * cut.slices;
  const char* error = launch(SumsForward<T>{{call}}, blocks, 1, cut.shared, place);
  return error ? error : launch(ApplyForward<T>{{call}}, blocks, 1, Shared::kBytes, place);
}

}  // namespace
}  // namespace ds

// Into how many tiles an image is cut, for the cluster or for two passes; 0 where it is not taken.
// size is that of an element of x, in bytes. shared, where not null, receives the bytes of a block.
EXPORT int64_t ds_cuda_group_norm_silu_tiles(int64_t pixels, int64_t channels, int64_t groups,
                                             int64_t size, bool cluster, int64_t* shared) {
  const ds::Cut cut = ds::cut_tiles(pixels, channels, groups, size, cluster);
  if (shared != nullptr) *shared = static_cast<int64_t>(cut.shared);
  return cut.tiles;
}

// x and y are contiguous [images, pixels, channels] that start on 16 bytes; weight and bias rows of
// [channels], from an image's to the next affine_stride values, 0 for one row of all; mean and rstd
// [images, groups]. table is [images, tiles, 2, channels] for two passes, null for a cluster.
// Returns null, or what went wrong.
EXPORT const char* ds_cuda_group_norm_silu(const void* x, const void* weight, const void* bias,
                                           void* y, float* mean, float* rstd, float* table,
                                           int64_t images, int64_t pixels, int64_t channels,
                                           int64_t groups, int64_t affine_stride, double eps,
                                           bool silu, int type, int weight_type, int bias_type,
                                           int device, cudaStream_t stream) {
  const int64_t size = type == ds::kFloat32 ? 4 : 2;
  const ds::Cut cut = ds::cut_tiles(pixels, channels, groups, size, table == nullptr);
  const auto forward = type == ds::kFloat32   ? ds::forward<float>
                       : type == ds::kFloat16 ? ds::forward<__half>
                                              : ds::forward<__nv_bfloat16>;
  return forward(cut, x, {weight, static_cast<ds::Type>(weight_type)},
                 {bias, static_cast<ds::Type>(bias_type)}, affine_stride, y, mean, rstd, table,
                 images, static_cast<float>(eps), silu, {device, stream});
}
