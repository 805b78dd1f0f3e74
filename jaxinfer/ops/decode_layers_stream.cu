// Part of decode_layers.cu, which says how all works: sizes, the stream of weights, activations in shared memory.
// (decode_layers.py joins the parts to one source: NVRTC has no files to include.)

// Sizes are macros: B rows, H width, N query heads, K KV heads, D head width, F MLP width, LAYERS, SMS blocks, PAGE tokens
// of a page, SPLITS parts of a cache, WARPS that stream, RING slots of each, CHUNKS of 16 bytes of a row in a slot, EPS,
// SCALE of scores (softmax in powers of two), HALF (float16, else bfloat16), ACTIVATION,
// biases QKV_BIAS, O_BIAS, MLP_BIAS. PARAMETERS, POINTERS: the kernel's arguments and their copy into `pointers`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int COMPUTE = WARPS * 32;
constexpr int G = N / K, HALF_D = D / 2, QUERIES = N * D, HEADS = N + 2 * K;
constexpr int TILE = CHUNKS * 8;                // columns of a weight that a warp takes at a time, 16 rows high
constexpr int ROW = TILE * 2, SLOT = 16 * ROW;  // bytes
constexpr int BUFFERS = 2;                      // of the warps' parts of a row group
constexpr int VEC = D % 8 == 0 ? 8 : 4;    // cache elements per lane and load
__host__ __device__ constexpr int power(int n) { int p = 1; while (p < n) p *= 2; return p; }
constexpr int LANES = power(D / VEC);      // that share a cached token
constexpr int TOKENS = 32 / LANES;         // of a warp at a time
constexpr int UNROLL = G == 1 ? 28 : 2;    // tokens that a lane loads before it works on them; with more, registers spill
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int CACHED_PAGES = 512;
constexpr int XS_PAD = 16;                 // bytes; rows start in different banks
constexpr int WIDEST = most(most(H, QUERIES), F);
constexpr int XS_BYTES = most(B * (WIDEST * 2 + XS_PAD), WARPS * G * (D + 2) * 4);
constexpr int PER_LAYER = 8 + QKV_BIAS + O_BIAS + 2 * MLP_BIAS;
constexpr int OWN_GROUPS = (H / 2 / SMS + 1 + 7) / 8;  // of the residual stream, at most
enum { INPUT_NORM, QKV, O, POST_NORM, GATE_UP, DOWN, K_POOL, V_POOL, BIASES };
constexpr int B_QKV = BIASES, B_O = B_QKV + QKV_BIAS, B_GATE_UP = B_O + O_BIAS, B_DOWN = B_GATE_UP + MLP_BIAS;
enum { X, COS, SIN, POSITIONS, TABLES, WINDOWS, WIDTH, COUNTERS, FIRST_LAYER };
constexpr int OUT = FIRST_LAYER + LAYERS * PER_LAYER, SCRATCH = OUT + 1, POINTER_COUNT = OUT + 2;

// bytes in the scratch buffer, as decode_layers.py counts them
constexpr int S_Q = 0, S_ATTN = S_Q + B * QUERIES * 2, S_H1 = S_ATTN + B * QUERIES * 2, S_H2 = S_H1 + B * H * 2,
              S_ACT = S_H2 + B * H * 2, S_ML = (S_ACT + B * F * 2 + 15) / 16 * 16, S_PART = S_ML + B * K * SPLITS * G * 8;

__device__ __forceinline__ u32 pack(float lo, float hi) {
  u32 d;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
#endif
  return d;
}

__device__ __forceinline__ float2 unpack(u32 v) {
#if HALF
  float2 r;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(r.x), "=f"(r.y) : "r"(v));
  return r;
#else
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#endif
}

__device__ __forceinline__ float rounded(float v) { return unpack(pack(v, 0.f)).x; }
__device__ __forceinline__ float load(const u16* p) { return unpack(__ldcg(p)).x; }
__device__ __forceinline__ void store(u16* p, float v) { *p = (u16)pack(v, 0.f); }

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy16(u32 to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

__device__ __forceinline__ uint4 shared16(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(COMPUTE) : "memory"); }  // compute warps
__device__ __forceinline__ void arrive(u32* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// adds one and says what was there before; what each block wrote before its turn is seen by the next
__device__ __forceinline__ u32 count(u32* counter) {
  u32 v;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(counter) : "memory");
  return v;
}
__device__ __forceinline__ u32 acquire(const u32* counter) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
  return v;
}

__device__ __forceinline__ float activation(float x) {
#if ACTIVATION == 0  // silu
  return x / (1.f + __expf(-x));
#elif ACTIVATION == 1  // gelu
  return 0.5f * x * (1.f + erff(x * 0.70710678f));
#elif ACTIVATION == 2  // gelu, tanh
  return 0.5f * x * (1.f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
#else
  return fmaxf(x, 0.f);
#endif
}

// a warp's tiles of a row group, from and to; who has one more than others changes with the group
__device__ __forceinline__ int2 share(int tiles, int warp, int group) {
  const int turn = (warp + group) % WARPS;
  return make_int2(tiles * turn / WARPS, tiles * (turn + 1) / WARPS);
}

struct Shape { int columns, pairs; };  // of a weight: its row length and how many pairs of rows it has
__device__ __forceinline__ Shape shape(int phase) {
  switch (phase) {
    case 0: return {H, HEADS * HALF_D};
    case 1: return {QUERIES, H / 2};
    case 2: return {H, F};
    default: return {F, H / 2};
  }
}
__device__ __forceinline__ int weight(int phase) { return phase == 0 ? QKV : phase == 1 ? O : phase == 2 ? GATE_UP : DOWN; }
// a block's pairs are those from first_pair(..., its number) to the next block's; it works on 8 at a time, a "group"
__device__ __forceinline__ int first_pair(int pairs, int block) { return (int)((long long)pairs * block / SMS); }

// the two output rows of a pair: the halves of a rotary pair, a gate and its up, or just two
__device__ __forceinline__ int2 rows(int phase, int pair) {
  if (phase == 0) {
    const int lo = pair / HALF_D * D + pair % HALF_D;
    return make_int2(lo, lo + HALF_D);
  }
  if (phase == 2) return make_int2(pair, F + pair);
  return make_int2(pair, H / 2 + pair);
}

// where in its row of a slot a chunk of 16 bytes lies: lanes that read two rows at once meet different banks
__device__ __forceinline__ int swizzled(int row, int chunk) { return CHUNKS == 4 ? chunk : chunk ^ (row & 1) * 4; }

constexpr int COPIES = 16 * CHUNKS / 32;  // of 16 bytes, per lane and slot

// what a warp streams: its columns of the block's row groups, phase after phase, layer after layer
struct Stream {
  const u64* pointers;
  const char* from[COPIES];
  int layer, phase, pair, last, tile, end, warp, lane;  // pair: the group's first

  __device__ void open() {  // from (layer, phase) on, the first group that this block has
    while (layer < LAYERS) {
      const Shape s = shape(phase);
      pair = first_pair(s.pairs, blockIdx.x), last = first_pair(s.pairs, blockIdx.x + 1);
      for (; pair < last; pair += 8) {
        aim();
        if (tile < end) return;
      }
      step();
    }
  }
  __device__ void step() { if (++phase == 4) phase = 0, ++layer; }
  __device__ void aim() {
    const Shape s = shape(phase);
    const char* w = (const char*)pointers[FIRST_LAYER + layer * PER_LAYER + weight(phase)] + lane % CHUNKS * 16;
#pragma unroll
    for (int i = 0; i < COPIES / 2; ++i) {
      // a group may have fewer than 8 pairs: what it has not is neither loaded nor kept
      const int2 row = rows(phase, min(pair + lane / CHUNKS + i * (32 / CHUNKS), last - 1));
      from[i] = w + (u64)row.x * s.columns * 2, from[COPIES / 2 + i] = w + (u64)row.y * s.columns * 2;
    }
    const int2 own = share(s.columns / TILE, warp, pair / 8);
    tile = own.x, end = own.y;
  }
  __device__ __forceinline__ void next() {
    if (++tile < end) return;
    while ((pair += 8) < last) {
      aim();
      if (tile < end) return;
    }
    step();
    open();
  }
  __device__ __forceinline__ void issue(u32 slot) {
    if (layer < LAYERS) {
#pragma unroll
      for (int i = 0; i < COPIES; ++i) {
        const int row = lane / CHUNKS + i * (32 / CHUNKS);
        if (pair + row % 8 >= last) continue;
        copy16(slot + row * ROW + swizzled(row, lane % CHUNKS) * 16, from[i] + tile * ROW);
      }
      next();
    }
    commit();  // an empty one too: waiting counts them
  }
};

// what the warps of a block say to its closer and back; volatile, with fences at both ends
struct Progress { volatile int parts[WARPS]; volatile int closed, met; };

__device__ __forceinline__ float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// rows of activations [B, columns] into shared memory
template <int COLUMNS>
__device__ __forceinline__ void stage(char* xs, const u16* source) {
  for (int b = 0; b < B; ++b) {
#pragma unroll
    for (int c = 0; c < (COLUMNS / 8 + COMPUTE - 1) / COMPUTE; ++c) {
      const int chunk = threadIdx.x + c * COMPUTE;
      if (chunk < COLUMNS / 8)
        *(uint4*)(xs + b * (COLUMNS * 2 + XS_PAD) + chunk * 16) = __ldcg((const uint4*)(source + b * COLUMNS) + chunk);
    }
  }
  meet();
}

constexpr int HELD = (H / 8 + COMPUTE - 1) / COMPUTE;  // chunks of a row of width H that a thread holds

__device__ __forceinline__ void load_norm(uint4 (&norm)[HELD], const u16* from) {
#pragma unroll
  for (int c = 0; c < HELD; ++c) {
    const int chunk = threadIdx.x + c * COMPUTE;
    norm[c] = chunk < H / 8 ? __ldg((const uint4*)from + chunk) : make_uint4(0, 0, 0, 0);
  }
}

// the same, normalized as ops/norm.py does
__device__ __forceinline__ void stage_normalized(char* xs, float* sums, const u16* source, const uint4 (&norm)[HELD]) {
  uint4 held[B][HELD];
#pragma unroll
  for (int b = 0; b < B; ++b) {
#pragma unroll
    for (int c = 0; c < HELD; ++c) {
      const int chunk = threadIdx.x + c * COMPUTE;
      held[b][c] = chunk < H / 8 ? __ldcg((const uint4*)(source + b * H) + chunk) : make_uint4(0, 0, 0, 0);
    }
  }
#pragma unroll
  for (int b = 0; b < B; ++b) {
    float sum = 0.f;
#pragma unroll
    for (int c = 0; c < HELD; ++c) {
      const u32 words[4] = {held[b][c].x, held[b][c].y, held[b][c].z, held[b][c].w};
      for (int i = 0; i < 4; ++i) { const float2 f = unpack(words[i]); sum += f.x * f.x + f.y * f.y; }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[b * WARPS + threadIdx.x / 32] = sum;
  }
  meet();
#pragma unroll
  for (int b = 0; b < B; ++b) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[b * WARPS + w];
    const float scale = rsqrtf(sum / H + EPS);
#pragma unroll
    for (int c = 0; c < HELD; ++c) {
      const int chunk = threadIdx.x + c * COMPUTE;
      if (chunk < H / 8) {
        const u32 words[4] = {held[b][c].x, held[b][c].y, held[b][c].z, held[b][c].w};
        const u32 weights[4] = {norm[c].x, norm[c].y, norm[c].z, norm[c].w};
        u32 out[4];
        for (int i = 0; i < 4; ++i) {
          const float2 f = unpack(words[i]), w = unpack(weights[i]), r = unpack(pack(f.x * scale, f.y * scale));
          out[i] = pack(r.x * w.x, r.y * w.y);
        }
        *(uint4*)(xs + b * (H * 2 + XS_PAD) + chunk * 16) = make_uint4(out[0], out[1], out[2], out[3]);
      }
    }
  }
  meet();
}

