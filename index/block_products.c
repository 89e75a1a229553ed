/* Integers: rows of a are taken in chunks (as pointers, so a pick costs nothing) against panels of
 * b; the kernel lays a panel out once per chunk. Norms come as floats, which hold integers below
 * 2^24 exactly; greater ones are taken again from the rows, so that distances are exact.
 *
 * Floats: one GEMM over the block, or over chunks of picked rows copied together on the stack; the
 * shapes follow from the arguments alone, and with them the bytes.
 *
 * Pools: offers beyond `worst` are passed over, others appended. When the places are full, a bound
 * is sought that leaves `limit` or a few more: the bits of floats, read as integers, are bisected
 * between the least and `worst`, counting how many lie below, which is cheaper than sorting. Only
 * what `limit` others are nearer than is dropped, hence what is left at the end does not depend on
 * the order of offers. */
#include "index/block_products.h"

#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "index/block_kernels.h"
#include "index/distance.h"
#include "index/gemm.h"
#include "index/list_kernels.h"

#define ALIGNMENT 64u
#define CHUNK_ROWS 512u             /* of integers, by pointer */
#define GATHER_BYTES (512u * 1024u) /* of floats, copied */
#define EXACT_IN_FLOAT (1u << 24)   /* integers below it */
#define POOL_PLACES_MAX (2u * BLOCK_POOL_LIMIT_MAX)

static_assert(GATHER_BYTES >= DISTANCE_DIM_MAX * sizeof(float), "one row at least");

static pthread_once_t choose_once = PTHREAD_ONCE_INIT;
static struct block_kernels chosen;
static const struct list_kernels *lists;
static const struct distance_kernels *vectors;

static void portable_panel(const struct block_panel *p)
{
    for (uint32_t i = 0; i < p->count_a; i++) {
        for (uint32_t j = 0; j < p->count_b; j++) {
            const uint8_t *a = p->rows_a[i], *b = p->b + j * p->stride;

            p->out[i * p->out_stride + j] =
                (float)(p->is_signed ? vectors->l2_i8((const int8_t *)a, (const int8_t *)b, p->dim)
                                     : vectors->l2_u8(a, b, p->dim));
        }
    }
}

static void portable_add_norms(float *out, uint32_t count, float norm_a, const float *norms_b)
{
    for (uint32_t j = 0; j < count; j++) {
        float sum = (norm_a + norms_b[j]) + out[j];

        out[j] = sum > 0 ? sum : 0;
    }
}

void block_pool_offer_portable(struct block_pool *pool, const float *distances, uint32_t count,
                               uint32_t first_id)
{
    for (uint32_t j = 0; j < count; j++) {
        if (!(distances[j] <= pool->worst))
            continue;
        if (pool->count == 2 * pool->limit) {
            block_pool_shrink(pool, block_pool_slack(pool));
            if (!(distances[j] <= pool->worst))
                continue;
        }
        pool->distances[pool->count] = distances[j];
        pool->ids[pool->count] = first_id + j;
        pool->count++;
    }
}

static void portable_pool_keep(struct block_pool *pool, float bound)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < pool->count; i++) {
        pool->distances[kept] = pool->distances[i];
        pool->ids[kept] = pool->ids[i];
        kept += pool->distances[i] <= bound;
    }
    pool->count = kept;
}

static void portable_pool_range(const struct block_pool *pool, float *least, float *greatest)
{
    *least = *greatest = pool->distances[0];
    for (uint32_t i = 1; i < pool->count; i++) {
        *least = pool->distances[i] < *least ? pool->distances[i] : *least;
        *greatest = pool->distances[i] > *greatest ? pool->distances[i] : *greatest;
    }
}

static void choose(void)
{
    vectors = distance_kernels_best();
    lists = list_kernels_best();
    chosen = (struct block_kernels){
        .name = vectors->name,
        .panel = portable_panel,
        .add_norms = portable_add_norms,
        .pool_offer = block_pool_offer_portable,
        .pool_keep = portable_pool_keep,
        .pool_range = portable_pool_range,
    };
#if defined(__x86_64__)
    for (int isa = ISA_AVX2; isa < ISA_COUNT; isa++) {
        if (vectors == distance_kernels_for(ISA_SCALAR))
            break;
        if (isa == ISA_AVX2)
            chosen.panel = block_panel_avx2;
        if (isa == ISA_AVX512) {
            chosen.add_norms = block_add_norms_avx512;
            chosen.pool_offer = block_pool_offer_avx512;
            chosen.pool_keep = block_pool_keep_avx512;
            chosen.pool_range = block_pool_range_avx512;
            chosen.pool_rank = block_pool_rank_avx512;
        }
        if (isa == ISA_AVX512_VNNI) {
            chosen.prepare = block_prepare_vnni;
            chosen.panel = block_panel_vnni;
        }
        if (vectors == distance_kernels_for((enum isa)isa))
            break;
    }
#endif
}

static const struct block_kernels *kernels(void)
{
    pthread_once(&choose_once, choose);
    return &chosen;
}

const char *block_products_isa(void)
{
    return kernels()->name;
}

uint64_t block_row_stride(enum element_type type, uint32_t dim)
{
    return (element_bytes(type, dim) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static uint32_t integer_norm(const uint8_t *row, uint32_t dim, bool is_signed)
{
    return is_signed ? vectors->norm2_i8((const int8_t *)row, dim) : vectors->norm2_u8(row, dim);
}

void block_norms(enum element_type type, const uint8_t *rows, uint32_t count, uint32_t dim,
                 float *out)
{
    uint64_t stride = block_row_stride(type, dim);

    assert(type == ELEMENT_F32 || type == ELEMENT_I8 || type == ELEMENT_U8);
    kernels();
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *row = rows + i * stride;

        out[i] = type == ELEMENT_F32 ? vectors->norm2_f32((const float *)(const void *)row, dim)
                                     : (float)integer_norm(row, dim, type == ELEMENT_I8);
    }
}

static uint32_t exact_norm(const uint8_t *row, float norm, uint32_t dim, bool is_signed)
{
    return norm < EXACT_IN_FLOAT ? (uint32_t)norm : integer_norm(row, dim, is_signed);
}

static void integer_distances(bool is_signed, const uint8_t *a, const uint32_t *pick,
                              uint32_t count_a, const float *norms_a, const uint8_t *b,
                              uint32_t count_b, const float *norms_b, uint32_t dim, uint64_t stride,
                              float *out, uint64_t out_stride)
{
    const struct block_kernels *with = kernels();
    const uint8_t *rows[CHUNK_ROWS];
    uint32_t bases[CHUNK_ROWS], panel_norms[BLOCK_PANEL_ROWS];
    struct block_panel panel = {.rows_a = rows,
                                .bases = bases,
                                .norms_b = panel_norms,
                                .stride = stride,
                                .dim = dim,
                                .is_signed = is_signed,
                                .out_stride = out_stride};

    for (uint32_t from = 0; from < count_a; from += CHUNK_ROWS) {
        panel.count_a = count_a - from < CHUNK_ROWS ? count_a - from : CHUNK_ROWS;
        for (uint32_t i = 0; i < panel.count_a; i++) {
            uint32_t row = pick ? pick[from + i] : from + i;

            rows[i] = a + row * stride;
            bases[i] = exact_norm(rows[i], norms_a[row], dim, is_signed);
        }
        if (with->prepare)
            with->prepare(rows, panel.count_a, stride, is_signed, bases);
        for (uint32_t to = 0; to < count_b; to += BLOCK_PANEL_ROWS) {
            panel.b = b + to * stride;
            panel.count_b = count_b - to < BLOCK_PANEL_ROWS ? count_b - to : BLOCK_PANEL_ROWS;
            panel.out = out + from * out_stride + to;
            for (uint32_t j = 0; j < panel.count_b; j++)
                panel_norms[j] = exact_norm(panel.b + j * stride, norms_b[to + j], dim, is_signed);
            with->panel(&panel);
        }
    }
}

/* -2ab of `count_a` rows one after the other. */
static void float_products(const float *a, uint32_t count_a, const float *b, uint32_t count_b,
                           uint32_t dim, uint64_t stride, float *out, uint64_t out_stride)
{
    gemm_f32(false, true, count_a, count_b, dim, -2.0f, a, stride, b, stride, 0.0f, out,
             out_stride);
}

/* Apart, so that only calls with a pick pay for its stack. */
static void __attribute__((noinline))
picked_products(const float *a, const uint32_t *pick, uint32_t count_a, const float *b,
                uint32_t count_b, uint32_t dim, uint64_t stride, float *out, uint64_t out_stride)
{
    _Alignas(ALIGNMENT) float rows[GATHER_BYTES / sizeof(float)];
    uint32_t chunk = (uint32_t)(sizeof rows / (stride * sizeof *rows));

    for (uint32_t from = 0; from < count_a; from += chunk) {
        uint32_t count = count_a - from < chunk ? count_a - from : chunk;

        for (uint32_t i = 0; i < count; i++)
            memcpy(rows + i * stride, a + pick[from + i] * stride, dim * sizeof *rows);
        float_products(rows, count, b, count_b, dim, stride, out + from * out_stride, out_stride);
    }
}

void block_distances(enum element_type type, const uint8_t *a, const uint32_t *pick,
                     uint32_t count_a, const float *norms_a, const uint8_t *b, uint32_t count_b,
                     const float *norms_b, uint32_t dim, float *out, uint64_t out_stride)
{
    uint64_t stride = block_row_stride(type, dim);
    const float *float_a = (const float *)(const void *)a,
                *float_b = (const float *)(const void *)b;

    assert(type == ELEMENT_F32 || type == ELEMENT_I8 || type == ELEMENT_U8);
    assert(dim > 0 && dim <= DISTANCE_DIM_MAX && out_stride >= count_b);
    if (count_a == 0 || count_b == 0)
        return;
    if (type != ELEMENT_F32) {
        integer_distances(type == ELEMENT_I8, a, pick, count_a, norms_a, b, count_b, norms_b, dim,
                          stride, out, out_stride);
        return;
    }
    stride /= sizeof(float);
    if (pick)
        picked_products(float_a, pick, count_a, float_b, count_b, dim, stride, out, out_stride);
    else
        float_products(float_a, count_a, float_b, count_b, dim, stride, out, out_stride);
    for (uint32_t i = 0; i < count_a; i++)
        kernels()->add_norms(out + i * out_stride, count_b, norms_a[pick ? pick[i] : i], norms_b);
}

/* Floats and integers in the same order; its own inverse on the bits. */
static int32_t order_of(float value)
{
    int32_t bits;

    memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? bits ^ INT32_MAX : bits;
}

static float value_of(int32_t order)
{
    int32_t bits = order < 0 ? order ^ INT32_MAX : order;
    float value;

    memcpy(&value, &bits, sizeof value);
    return value;
}

void block_pool_init(struct block_pool *pool, float *distances, uint32_t *ids, uint32_t limit)
{
    assert(limit > 0 && limit <= BLOCK_POOL_LIMIT_MAX);
    *pool =
        (struct block_pool){.distances = distances, .ids = ids, .limit = limit, .worst = INFINITY};
}

void block_pool_offer(struct block_pool *pool, const float *distances, uint32_t count,
                      uint32_t first_id, uint32_t skip)
{
    const struct block_kernels *with = kernels();
    uint32_t before = skip - first_id;

    if (skip < first_id || before >= count) {
        with->pool_offer(pool, distances, count, first_id);
        return;
    }
    with->pool_offer(pool, distances, before, first_id);
    with->pool_offer(pool, distances + before + 1, count - before - 1, skip + 1);
}

/* The `wanted` smallest of count ids, all different: the greatest of them. */
static uint32_t nth_id(const uint32_t *ids, uint32_t count, uint32_t wanted)
{
    uint32_t low = 0, high = UINT32_MAX;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2, found = 0;

        for (uint32_t i = 0; i < count; i++)
            found += ids[i] <= middle;
        if (found >= wanted)
            high = middle;
        else
            low = middle + 1;
    }
    return high;
}

/* Of those at the bound, which is the greatest distance left, as many of the smallest ids as fit.
 */
static void drop_ties(struct block_pool *pool, float bound, uint32_t nearer)
{
    uint32_t ids[POOL_PLACES_MAX];
    uint32_t ties = 0, kept = 0, last;

    for (uint32_t i = 0; i < pool->count; i++)
        if (pool->distances[i] == bound)
            ids[ties++] = pool->ids[i];
    last = nth_id(ids, ties, pool->limit - nearer);
    for (uint32_t i = 0; i < pool->count; i++) {
        if (pool->distances[i] < bound || pool->ids[i] <= last) {
            pool->distances[kept] = pool->distances[i];
            pool->ids[kept++] = pool->ids[i];
        }
    }
    pool->count = kept;
}

void block_pool_shrink(struct block_pool *pool, uint32_t slack)
{
    const struct block_kernels *with = kernels();
    uint32_t count = pool->count, nearer = 0, within = count;
    float least, greatest;
    int32_t low, high;

    /* All distances lie in [low, high]; `nearer` lie below low, `within` not beyond high. */
    with->pool_range(pool, &least, &greatest);
    low = order_of(least + 0.0f); /* of both zeros the greater in this order: they are equal */
    high = order_of(greatest + 0.0f);
    while (low < high && within - pool->limit > slack) {
        int32_t middle = (int32_t)(((int64_t)low + high) >> 1);
        uint32_t found = lists->below(pool->distances, count, value_of(middle + 1));

        if (found >= pool->limit) {
            high = middle;
            within = found;
        } else {
            low = middle + 1;
            nearer = found;
        }
    }
    pool->worst = value_of(high);
    if (within < count)
        with->pool_keep(pool, pool->worst);
    if (within - pool->limit > slack)
        drop_ties(pool, pool->worst, nearer);
}

/* Merges sorted halves of runs of `run` keys from one array into the other. */
static void merge_runs(const uint64_t *from, uint64_t *to, uint32_t count, uint32_t run)
{
    for (uint32_t at = 0; at < count; at += 2 * run) {
        uint32_t i = at, middle = at + run < count ? at + run : count;
        uint32_t j = middle, end = at + 2 * run < count ? at + 2 * run : count;

        for (uint32_t k = at; k < end; k++) {
            bool left = i < middle && (j >= end || from[i] < from[j]);

            to[k] = left ? from[i] : from[j];
            i += left;
            j += !left;
        }
    }
}

static void sort_by_merging(struct block_pool *pool)
{
    uint64_t keys[2][BLOCK_POOL_LIMIT_MAX];
    uint32_t from = 0;

    for (uint32_t i = 0; i < pool->count; i++) {
        /* Moving the sign makes the order one of unsigned numbers. */
        uint32_t order = (uint32_t)order_of(pool->distances[i]) ^ 0x80000000u;

        keys[0][i] = (uint64_t)order << 32 | pool->ids[i];
    }
    for (uint32_t run = 1; run < pool->count; run *= 2, from ^= 1)
        merge_runs(keys[from], keys[from ^ 1], pool->count, run);
    for (uint32_t i = 0; i < pool->count; i++) {
        pool->distances[i] = value_of((int32_t)((uint32_t)(keys[from][i] >> 32) ^ 0x80000000u));
        pool->ids[i] = (uint32_t)keys[from][i];
    }
}

static void sort_by_ranks(struct block_pool *pool)
{
    uint32_t ranks[BLOCK_POOL_RANKED], ids[BLOCK_POOL_RANKED];
    float distances[BLOCK_POOL_RANKED];

    kernels()->pool_rank(pool, ranks);
    for (uint32_t i = 0; i < pool->count; i++) {
        distances[ranks[i]] = pool->distances[i];
        ids[ranks[i]] = pool->ids[i];
    }
    /* Only equal distances may still be out of order. */
    for (uint32_t i = 0; i < pool->count; i++) {
        uint32_t to = i;

        for (; to > 0 && distances[i] == pool->distances[to - 1] && ids[i] < pool->ids[to - 1];
             to--)
            pool->ids[to] = pool->ids[to - 1];
        pool->ids[to] = ids[i];
        pool->distances[i] = distances[i];
    }
}

uint32_t block_pool_finish(struct block_pool *pool)
{
    if (pool->count > pool->limit)
        block_pool_shrink(pool, 0);
    for (uint32_t i = 0; i < pool->count; i++)
        pool->distances[i] += 0.0f; /* makes one of both zeros */
    if (kernels()->pool_rank && pool->count <= BLOCK_POOL_RANKED)
        sort_by_ranks(pool);
    else
        sort_by_merging(pool);
    return pool->count;
}
