// All layers of one stage for a few decoding rows, in one launch: one block per multiprocessor stays from the first
// layer to the last. Weights do not depend on activations, so each warp streams its part of them through a ring in
// shared memory without ever waiting for the other blocks: while the grid meets between two phases, the next phase's
// weights are on their way, and memory never rests.
//
// A layer is five phases, each ended by a meeting of the grid: q/k/v (with rotary embedding and cache write), attention
// (split over the cache), attention output, gate/up, down. A matmul is cut by output rows, 16 at a time: the warps of a
// block share the 16 rows by columns, and the last warp of the block (the "closer") adds their parts, in one order.
//
// decode_layers_stream.cu and decode_layers_attention.cu come before this in the source that is compiled.

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
