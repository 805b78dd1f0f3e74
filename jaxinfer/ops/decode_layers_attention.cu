// Part of decode_layers.cu, which says how all works: attention of the new tokens over the cache.
// (decode_layers.py joins the parts to one source: NVRTC has no files to include.)

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

