// All layers of one stage for a few decoding rows, in one launch: one block per multiprocessor stays from the first
// layer to the last. Weights do not depend on activations, so each warp streams its part of them through a ring in
// shared memory without ever waiting for the other blocks: while the grid meets between two phases, the next phase's
// weights are on their way, and memory never rests.
//
// A layer is five phases, each ended by a meeting of the grid: q/k/v (with rotary embedding and cache write), attention
// (split over the cache), attention output, gate/up, down. A matmul is cut by output rows, 16 at a time: the warps of a
// block share the 16 rows by columns, and the last warp of the block (the "closer") adds their parts, in one order.
//
// Sizes are macros: B rows, H width, N query heads, K KV heads, D head width, F MLP width, LAYERS, SMS blocks, PAGE tokens
// of a page, SPLITS parts of a cache, WARPS that stream, RING slots of each, CHUNKS of 16 bytes of a row in a slot, EPS,
// SCALE of scores (softmax in powers of two), HALF (float16, else bfloat16), ACTIVATION,
// biases QKV_BIAS, O_BIAS, MLP_BIAS. PARAMETERS, POINTERS: the kernel's arguments and their copy into `pointers`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int COMPUTE = WARPS * 32;
constexpr int G = N / K, HALF_D = D / 2, QUERIES = N * D, HEADS = N + 2 * K;
constexpr int TILE = CHUNKS * 8;           // columns of a weight that a warp takes at a time, 16 rows high
constexpr int ROW = TILE * 2, SLOT = 16 * ROW;  // bytes
constexpr int BUFFERS = 2;                 // of the warps' parts of a row group
constexpr int VEC = D % 8 == 0 ? 8 : 4;    // cache elements per lane and load
__host__ __device__ constexpr int power(int n) { int p = 1; while (p < n) p *= 2; return p; }
constexpr int LANES = power(D / VEC);      // that share a cached token
constexpr int TOKENS = 32 / LANES;         // of a warp at a time
constexpr int UNROLL = G == 1 ? 28 : G <= 4 ? 2 : 2;  // tokens that a lane loads before it works on them
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

// What is the same in every layer of a step, read once: a trip to memory less where all wait for it.
struct Step {
  int width, windows[LAYERS];
  int lengths[B];  // with the new token; 0 where the row is not live
  u64 cells[B];    // of the new tokens
  int pages[CACHED_PAGES];  // of the row of the block's first attention unit
};

// one lane's keys and values of UNROLL tokens, those `at`, `at` + WARPS * TOKENS, ... for which `wanted` holds
template <class Wanted>
__device__ __forceinline__ void load_cache(u32 (&k)[UNROLL][VEC / 2], u32 (&v)[UNROLL][VEC / 2], const u16* k_pool,
                                           const u16* v_pool, const int (&page)[UNROLL], int head, int part, int at,
                                           Wanted wanted) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int token = at + u * WARPS * TOKENS;
    if (!wanted(token)) continue;
    const u64 offset = (((u64)page[u] * PAGE + token % PAGE) * K + head) * D + part * VEC;
    if (VEC == 8) {
      const uint4 a = __ldcg((const uint4*)(k_pool + offset)), c = __ldcg((const uint4*)(v_pool + offset));
      k[u][0] = a.x, k[u][1] = a.y, k[u][VEC / 2 - 2] = a.z, k[u][VEC / 2 - 1] = a.w;
      v[u][0] = c.x, v[u][1] = c.y, v[u][VEC / 2 - 2] = c.z, v[u][VEC / 2 - 1] = c.w;
    } else {
      const uint2 a = __ldcg((const uint2*)(k_pool + offset)), c = __ldcg((const uint2*)(v_pool + offset));
      k[u][0] = a.x, k[u][1] = a.y, v[u][0] = c.x, v[u][1] = c.y;
    }
  }
}

// One block's part of attention: (row, KV head, split) units; the last split of a head to end joins them all. What of the
// cache is older than this step is loaded before `begin`, which waits for the queries and the new keys and values.
template <class Begin>
__device__ __forceinline__ void attention(const u64* pointers, const Step* step, char* shared, char* scratch, int layer,
                                          u32* counters, int* flag, Begin begin) {
  const u64* own = pointers + FIRST_LAYER + layer * PER_LAYER;
  const u16 *k_pool = (const u16*)own[K_POOL], *v_pool = (const u16*)own[V_POOL];
  const int window = step->windows[layer];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % LANES, place = lane / LANES;
  const bool inside = part * VEC < D;
  float *ms = (float*)shared, *ls = ms + WARPS * G, *accs = ls + WARPS * G;
  bool begun = false;
  for (int unit = blockIdx.x; unit < B * K * SPLITS; unit += SMS) {
    const int b = unit / (K * SPLITS), head = unit / SPLITS % K, split = unit % SPLITS;
    const int* table = (const int*)pointers[TABLES] + b * step->width;
    const int length = step->lengths[b], first = max(0, length - window);
    const int share = (length - first + SPLITS - 1) / SPLITS, start = first + split * share, stop = min(start + share, length);
    u32 k[UNROLL][VEC / 2], v[UNROLL][VEC / 2];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
#pragma unroll
      for (int i = 0; i < VEC / 2; ++i) k[u][i] = v[u][i] = 0;
    int at = start + warp * TOKENS + place;
    int page[UNROLL];
    const auto look_up = [&] {
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const int number = (at + u * WARPS * TOKENS) / PAGE;
        page[u] = at + u * WARPS * TOKENS >= stop ? 0 : unit < SMS && number < CACHED_PAGES ? step->pages[number] : __ldg(table + number);
      }
    };
    look_up();
    load_cache(k, v, k_pool, v_pool, page, head, part, at, [&](int token) { return inside && token < min(stop, length - 1); });
    if (!begun) begin();
    begun = true;
    load_cache(k, v, k_pool, v_pool, page, head, part, at, [&](int token) { return inside && token < stop && token == length - 1; });
    u32 q[G][VEC / 2];
    float acc[G][VEC], m[G], l[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      m[g] = -1e30f, l[g] = 0.f;
#pragma unroll
      for (int i = 0; i < VEC; ++i) acc[g][i] = 0.f;
      const u32* from = (const u32*)(scratch + S_Q) + ((b * N + head * G + g) * D + part * VEC) / 2;
#pragma unroll
      for (int i = 0; i < VEC / 2; ++i) q[g][i] = inside ? __ldcg(from + i) : 0;
    }
    // a warp's lanes go the same number of rounds: they exchange sums
    const int rounds = (stop - start - warp * TOKENS + WARPS * TOKENS * UNROLL - 1) / (WARPS * TOKENS * UNROLL);
    for (int round = 0; round < rounds; ++round) {
      if (round) {
        look_up();
        load_cache(k, v, k_pool, v_pool, page, head, part, at, [&](int token) { return inside && token < stop; });
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float score[UNROLL], top = m[g];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < VEC / 2; ++i) {
            const float2 a = unpack(q[g][i]), c = unpack(k[u][i]);
            sum += a.x * c.x + a.y * c.y;
          }
#pragma unroll
          for (int o = LANES / 2; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
          score[u] = at + u * WARPS * TOKENS < stop ? sum * SCALE : -1e30f;
          top = fmaxf(top, score[u]);
        }
        const float kept = exp2f(m[g] - top);
        m[g] = top, l[g] *= kept;
#pragma unroll
        for (int i = 0; i < VEC; ++i) acc[g][i] *= kept;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
          const float p = at + u * WARPS * TOKENS < stop ? exp2f(score[u] - top) : 0.f;
          l[g] += p;
#pragma unroll
          for (int i = 0; i < VEC / 2; ++i) {
            const float2 c = unpack(v[u][i]);
            acc[g][2 * i] += p * c.x, acc[g][2 * i + 1] += p * c.y;
          }
        }
      }
      at += WARPS * TOKENS * UNROLL;
    }
    // the lanes' tokens, then the warps', become one
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int o = LANES; o < 32; o <<= 1) {
        const float other = __shfl_xor_sync(~0u, m[g], o), top = fmaxf(m[g], other);
        const float mine = exp2f(m[g] - top), theirs = exp2f(other - top);
        m[g] = top, l[g] = l[g] * mine + __shfl_xor_sync(~0u, l[g], o) * theirs;
#pragma unroll
        for (int i = 0; i < VEC; ++i) acc[g][i] = acc[g][i] * mine + __shfl_xor_sync(~0u, acc[g][i], o) * theirs;
      }
      if (lane == 0) ms[warp * G + g] = m[g], ls[warp * G + g] = l[g];
      if (place == 0 && inside) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) accs[(warp * G + g) * D + part * VEC + i] = acc[g][i];
      }
    }
    meet();
    float2* ml = (float2*)(scratch + S_ML) + (b * K + head) * SPLITS * G;
    float* parts = (float*)(scratch + S_PART) + (u64)(b * K + head) * SPLITS * G * D;
    u16* out = (u16*)(scratch + S_ATTN) + (b * N + head * G) * D;
    for (int e = threadIdx.x; e < G * D; e += COMPUTE) {
      const int g = e / D;
      float top = -1e30f, sum = 0.f, total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, ms[w * G + g]);
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float scale = exp2f(ms[w * G + g] - top);
        sum += accs[w * G * D + e] * scale, total += ls[w * G + g] * scale;
      }
      if (SPLITS == 1) store(out + e, total > 0.f ? sum / total : 0.f);
      else {
        __stcg(parts + split * G * D + e, sum);
        if (e % D == 0) __stcg(ml + split * G + g, make_float2(top, total));
      }
    }
    meet();  // the next unit overwrites what is shared
    if (SPLITS > 1) {
      if (threadIdx.x == 0) *flag = count(counters + 1 + (layer * B + b) * K + head) == SPLITS - 1;
      meet();
      if (*flag) {
        float2* joined = (float2*)shared;
        for (int i = threadIdx.x; i < SPLITS * G; i += COMPUTE) joined[i] = __ldcg(ml + i);
        meet();
        for (int e = threadIdx.x; e < G * D; e += COMPUTE) {
          const int g = e / D;
          float own[SPLITS], top = -1e30f, sum = 0.f, total = 0.f;
#pragma unroll
          for (int s = 0; s < SPLITS; ++s) own[s] = __ldcg(parts + s * G * D + e), top = fmaxf(top, joined[s * G + g].x);
#pragma unroll
          for (int s = 0; s < SPLITS; ++s) {
            const float scale = exp2f(joined[s * G + g].x - top);
            sum += own[s] * scale, total += joined[s * G + g].y * scale;
          }
          store(out + e, total > 0.f ? sum / total : 0.f);
        }
        meet();
      }
    }
  }
  if (!begun) begin();
}

// One group's output rows, once its sums are there: what follows a matmul in the layer, for this block's rows. The rows of
// the residual stream are the same in both phases that add to it, so a block keeps its own.
__device__ __forceinline__ void close_group(const u64* pointers, const Step* step, char* scratch, int layer, int phase, int2 row,
                                            const float (&turn)[4], float4 sum, float4* residual, u16* out) {
  const int lane = threadIdx.x % 32;
  const u64* own = pointers + FIRST_LAYER + layer * PER_LAYER;
  float4 kept = phase & 1 ? *residual : make_float4(0.f, 0.f, 0.f, 0.f);
  float* keep = &kept.x;
  const float los[2] = {sum.x, sum.y}, his[2] = {sum.z, sum.w};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int b = (lane & 3) * 2 + c;
    if (b >= B) continue;
    float lo = los[c], hi = his[c];
    if (phase == 0) {
      if (QKV_BIAS) lo += load((const u16*)own[B_QKV] + row.x), hi += load((const u16*)own[B_QKV] + row.y);
      lo = rounded(lo), hi = rounded(hi);
      const int head = row.x / D, i = row.x % D;
      if (head < N + K) {
        const float cos = turn[2 * c], sin = turn[2 * c + 1];
        const float turned = lo * cos - hi * sin;
        hi = hi * cos + lo * sin, lo = turned;
      }
      if (head < N) {
        u16* q = (u16*)(scratch + S_Q) + (b * N + head) * D + i;
        store(q, lo), store(q + HALF_D, hi);
      } else {
        const int kv = (head - N) % K;
        u16* to = (u16*)own[head < N + K ? K_POOL : V_POOL] + (step->cells[b] * K + kv) * D + i;
        store(to, lo), store(to + HALF_D, hi);
      }
    } else if (phase == 2) {
      if (MLP_BIAS) lo += load((const u16*)own[B_GATE_UP] + row.x), hi += load((const u16*)own[B_GATE_UP] + row.y);
      store((u16*)(scratch + S_ACT) + (u64)b * F + row.x, activation(lo) * hi);
    } else {
      if (phase == 1 && O_BIAS) lo += load((const u16*)own[B_O] + row.x), hi += load((const u16*)own[B_O] + row.y);
      if (phase == 3 && MLP_BIAS) lo += load((const u16*)own[B_DOWN] + row.x), hi += load((const u16*)own[B_DOWN] + row.y);
      keep[c] = rounded(keep[c] + lo), keep[2 + c] = rounded(keep[2 + c] + hi);
      store(out + b * H + row.x, keep[c]), store(out + b * H + row.y, keep[2 + c]);
    }
  }
  if (phase & 1) *residual = kept;
}

extern "C" __global__ void __launch_bounds__(COMPUTE + 32, 1) decode_layers(PARAMETERS) {
  extern __shared__ __align__(1024) char shared[];
  char* ring = shared;
  float4* parts = (float4*)(ring + WARPS * RING * SLOT);
  char* xs = (char*)(parts + BUFFERS * WARPS * 32);
  u64* pointers = (u64*)(xs + (XS_BYTES + 15) / 16 * 16);
  float4* residual = (float4*)(pointers + (POINTER_COUNT + 1) / 2 * 2);
  float* sums = (float*)(residual + OWN_GROUPS * 32);
  Progress* progress = (Progress*)(sums + B * WARPS);
  int* flag = (int*)(progress + 1);
  Step* step = (Step*)(((u64)(flag + 1) + 7) / 8 * 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    POINTERS
    for (int w = 0; w < WARPS; ++w) progress->parts[w] = 0;
    progress->closed = progress->met = 0;
  }
  __syncthreads();
  {
    const int width = *(const int*)pointers[WIDTH], *tables = (const int*)pointers[TABLES];
    if (threadIdx.x == 0) step->width = width;
    for (int i = threadIdx.x; i < LAYERS; i += COMPUTE + 32) step->windows[i] = ((const int*)pointers[WINDOWS])[i];
    if (threadIdx.x < B) {
      const int position = ((const int*)pointers[POSITIONS])[threadIdx.x];
      step->lengths[threadIdx.x] = position + 1;
      // a row that is not live writes to the null page
      const int page = position < 0 ? 0 : tables[threadIdx.x * width + position / PAGE];
      step->cells[threadIdx.x] = (u64)page * PAGE + (position < 0 ? 0 : position % PAGE);
    }
    const int row = min((int)blockIdx.x / (K * SPLITS), B - 1);
    for (int i = threadIdx.x; i < min(width, CACHED_PAGES); i += COMPUTE + 32) step->pages[i] = tables[row * width + i];
  }
  __syncthreads();
  u32* counters = (u32*)pointers[COUNTERS];
  char* scratch = (char*)pointers[SCRATCH];
  u16 *h1 = (u16*)(scratch + S_H1), *h2 = (u16*)(scratch + S_H2);

  if (warp == WARPS) {  // the closer
    const int own_first = first_pair(H / 2, blockIdx.x), own_last = first_pair(H / 2, blockIdx.x + 1);
    const int g = lane >> 2, column = (lane & 3) * 2;
    for (int pair = own_first; pair < own_last; pair += 8) {
      const int2 row = rows(1, min(pair + g, own_last - 1));
      const u16* x = (const u16*)pointers[X];
      float4 kept = make_float4(0.f, 0.f, 0.f, 0.f);
      if (column < B) kept.x = load(x + column * H + row.x), kept.z = load(x + column * H + row.y);
      if (column + 1 < B) kept.y = load(x + (column + 1) * H + row.x), kept.w = load(x + (column + 1) * H + row.y);
      residual[(pair - own_first) / 8 * 32 + lane] = kept;
    }
    int done = 0;
    for (int layer = 0; layer < LAYERS; ++layer) {
      for (int phase = 0; phase < 4; ++phase) {
        const Shape s = shape(phase);
        u16* out = phase == 1 ? h1 : layer == LAYERS - 1 ? (u16*)pointers[OUT] : h2;
        const int begin = first_pair(s.pairs, blockIdx.x), end = first_pair(s.pairs, blockIdx.x + 1);
        for (int pair = begin; pair < end; pair += 8) {
          const int2 row = rows(phase, min(pair + g, end - 1));
          float turn[4] = {};
          if (phase == 0) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int at = min(column + c, B - 1) * HALF_D + row.x % D;
              turn[2 * c] = __ldg((const float*)pointers[COS] + at), turn[2 * c + 1] = __ldg((const float*)pointers[SIN] + at);
            }
          }
          while (__any_sync(~0u, lane < WARPS && progress->parts[lane] <= done)) {}
          __threadfence_block();
          float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
          const float4* from = parts + (done % BUFFERS) * WARPS * 32 + lane;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) {
            const float4 p = from[w * 32];
            sum.x += p.x, sum.y += p.y, sum.z += p.z, sum.w += p.w;
          }
          __threadfence_block();
          __syncwarp();
          if (lane == 0) progress->closed = done + 1;
          ++done;
          if (pair + g < end)
            close_group(pointers, step, scratch, layer, phase, row, turn, sum, residual + (pair - begin) / 8 * 32 + lane, out);
        }
        __syncwarp();
        if (lane == 0) arrive(counters);
        // after q/k/v the blocks meet twice: attention comes between
        for (int meeting = phase ? layer * 5 + phase + 2 : layer * 5 + 1; meeting <= layer * 5 + phase + 2; ++meeting) {
          if (lane == 0) {
            while (acquire(counters) < meeting * SMS) {}
            __threadfence_block();
            progress->met = meeting;
          }
        }
      }
    }
    return;
  }

  const u32 ring_at = (u32)__cvta_generic_to_shared(ring) + warp * RING * SLOT;
  const u32 xs_at = (u32)__cvta_generic_to_shared(xs);
  Stream stream;
  stream.pointers = pointers, stream.layer = stream.phase = 0, stream.warp = warp, stream.lane = lane;
  stream.open();
  // a slot that was read is filled again at once; while a warp waits for the others it fills one more
  constexpr int FLIGHT = RING - 2;
  int full = 0, tail = 0, head = 0, done = 0, meetings = 0;
  const auto fill = [&] {
    wait<FLIGHT - 1>();
    stream.issue(ring_at + head * SLOT);
    head = head == RING - 1 ? 0 : head + 1, ++full;
  };
  while (full < FLIGHT) fill();
  for (int layer = 0; layer < LAYERS; ++layer) {
    for (int phase = 0; phase < 4; ++phase) {
      const auto gather = [&] {
        while (progress->met < meetings) {
          if (full < RING - 1) fill();
        }
        __threadfence_block();
      };
      if (phase == 1) {
        attention(pointers, step, xs, scratch, layer, counters, flag, gather);
        meet();
        if (threadIdx.x == 0) arrive(counters);
        ++meetings;
      }
      const u64* own = pointers + FIRST_LAYER + layer * PER_LAYER;
      const Shape s = shape(phase);
      uint4 norm[HELD];
      if (phase % 2 == 0) load_norm(norm, (const u16*)own[phase ? POST_NORM : INPUT_NORM]);
      gather();
      if (phase == 0) stage_normalized(xs, sums, layer ? h2 : (const u16*)pointers[X], norm);
      else if (phase == 1) stage<QUERIES>(xs, (const u16*)(scratch + S_ATTN));
      else if (phase == 2) stage_normalized(xs, sums, h1, norm);
      else stage<F>(xs, (const u16*)(scratch + S_ACT));
      ++meetings;
      const int g = lane >> 2;
      const u32 x_at = xs_at + min(g, B - 1) * (s.columns * 2 + XS_PAD) + (lane & 3) * 16;
      for (int pair = first_pair(s.pairs, blockIdx.x); pair < first_pair(s.pairs, blockIdx.x + 1); pair += 8) {
        float acc[4] = {0.f, 0.f, 0.f, 0.f};
        const int2 own = share(s.columns / TILE, warp, pair / 8);
        for (int tile = own.x; tile < own.y; ++tile) {
          if (full == FLIGHT) fill();
          __syncwarp();
          const u32 at = ring_at + tail * SLOT + g * ROW;
#pragma unroll
          for (int c = 0; c < CHUNKS; c += 4) {
            const u32 chunk = swizzled(g, c + (lane & 3)) * 16;
            const uint4 lo = shared16(at + chunk), hi = shared16(at + 8 * ROW + chunk);
            uint4 x = make_uint4(0, 0, 0, 0);
            if (g < B) x = shared16(x_at + tile * ROW + c * 16);
            mma(acc, lo.x, hi.x, lo.y, hi.y, x.x, x.y);
            mma(acc, lo.z, hi.z, lo.w, hi.w, x.z, x.w);
          }
          tail = tail == RING - 1 ? 0 : tail + 1, --full;
        }
        while (progress->closed + BUFFERS <= done) {}
        __threadfence_block();
        parts[((done % BUFFERS) * WARPS + warp) * 32 + lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
        __threadfence_block();
        __syncwarp();
        ++done;
        if (lane == 0) progress->parts[warp] = done;
      }
    }
  }
}
