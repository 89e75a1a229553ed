/* One pass over the base keeps, per query, the k + MARGIN nearest by float arithmetic in a binary
 * heap (worst on top). A second look at just those rows computes their distances in double and
 * sorts: the margin covers what float rounding may have put in the wrong order around rank k.
 *
 * The pass multiplies blocks of queries and rows (gemm.h). Where vectors lie close together far
 * from the origin that loses digits: a query whose k-th neighbour is not nearer than the worst that
 * was kept by more than all that rounding can do is scanned again, by kernels that subtract first.
 */
#include "index/flat.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/gemm.h"
#include "index/store.h"

#define MARGIN 64u
#define BLOCK_BYTES (8u << 20)
#define QUERY_TILE 128u /* queries and rows multiplied at once: the products stay in cache */
#define ROW_TILE 512u
#define CHUNK 32u /* products looked at together */

struct near {
    float distance; /* smaller is nearer, whatever the metric */
    uint32_t row;
};

struct ranked {
    double distance;
    uint32_t row;
};

struct scan {
    const struct vector_source *base;
    const float *queries;
    enum metric metric;
    uint32_t dim;
    uint32_t query_count;
    uint32_t heap_max;
    struct near *heaps; /* query_count x heap_max */
    uint32_t *heap_counts;
    uint64_t first_row; /* of the block */
    uint32_t row_count;
    /* Products */
    float *directions;     /* the queries as multiplied: normalised for cosine */
    float *vectors;        /* the block, block_rows x dim; normalised for cosine */
    float *norms;          /* squared */
    float *products;       /* a tile for each worker */
    struct error *errors;  /* of each worker */
    uint64_t *error_rows;  /* where its block began */
    float *norms_greatest; /* of each worker */
    /* Kernels */
    const uint32_t *chosen;       /* queries scanned again */
    struct store_query *prepared; /* of each of them */
    const uint8_t *rows;          /* the block, as stored by `store` */
    uint32_t row_stride;
};

static bool nearer(const struct near *a, const struct near *b)
{
    return a->distance < b->distance || (a->distance == b->distance && a->row < b->row);
}

static void heap_offer(struct near *heap, uint32_t *count, uint32_t max, struct near item)
{
    uint32_t i;

    if (*count < max) {
        i = (*count)++;
        for (; i > 0 && nearer(&heap[(i - 1) / 2], &item); i = (i - 1) / 2)
            heap[i] = heap[(i - 1) / 2];
        heap[i] = item;
        return;
    }
    if (!nearer(&item, &heap[0]))
        return;
    for (i = 0;;) {
        uint32_t child = 2 * i + 1;

        if (child >= max)
            break;
        if (child + 1 < max && nearer(&heap[child], &heap[child + 1]))
            child++;
        if (!nearer(&item, &heap[child]))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = item;
}

/* ---- by products ---- */

static void read_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct scan *s = context;
    float *vectors = s->vectors + begin * s->dim;
    uint64_t first = s->first_row + begin, count = end - begin;
    struct error err = ERROR_INIT;

    if (vector_source_read_f32(s->base, first, count, vectors, &err) < 0 ||
        vector_check_finite(vectors, first, count, s->dim, &err) < 0) {
        /* Of several errors the first in the base is told. */
        if (!s->errors[worker].code || first < s->error_rows[worker]) {
            s->errors[worker] = err;
            s->error_rows[worker] = first;
        }
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        float *vector = vectors + i * s->dim, norm;

        if (s->metric == METRIC_COSINE)
            vector_normalise(vector, s->dim);
        norm = distance_kernels_best()->norm2_f32(vector, s->dim);
        s->norms[begin + i] = norm;
        if (norm > s->norms_greatest[worker])
            s->norms_greatest[worker] = norm;
    }
}

static int read_error(const struct scan *s, uint32_t workers, struct error *err)
{
    uint32_t first = UINT32_MAX;

    for (uint32_t w = 0; w < workers; w++)
        if (s->errors[w].code && (first == UINT32_MAX || s->error_rows[w] < s->error_rows[first]))
            first = w;
    if (first == UINT32_MAX)
        return 0;
    *err = s->errors[first];
    return -1;
}

/* Offers the rows of one tile to a query's heap. L2 leaves out the query's own norm. */
static void offer_products(struct scan *s, uint64_t query, float *products, uint32_t first,
                           uint32_t count)
{
    struct near *heap = s->heaps + query * s->heap_max;
    const float *norms = s->norms + first;
    uint32_t *kept = &s->heap_counts[query];

    if (s->metric == METRIC_L2)
        for (uint32_t i = 0; i < count; i++)
            products[i] = norms[i] - 2 * products[i];
    else
        for (uint32_t i = 0; i < count; i++)
            products[i] = -products[i];
    for (uint32_t begin = 0; begin < count; begin += CHUNK) {
        uint32_t end = count - begin < CHUNK ? count : begin + CHUNK, near = 0;
        float bound = *kept < s->heap_max ? INFINITY : heap[0].distance;

        for (uint32_t i = begin; i < end; i++)
            near += products[i] <= bound;
        for (uint32_t i = begin; near && i < end; i++)
            if (products[i] <= bound)
                heap_offer(heap, kept, s->heap_max,
                           (struct near){products[i], (uint32_t)(s->first_row + first + i)});
    }
}

/* Begins at a multiple of QUERY_TILE: what is multiplied together never depends on the pool. */
static void multiply_queries(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct scan *s = context;
    float *products = s->products + (uint64_t)worker * QUERY_TILE * ROW_TILE;

    for (uint32_t first = 0; first < s->row_count; first += ROW_TILE) {
        uint32_t count = s->row_count - first < ROW_TILE ? s->row_count - first : ROW_TILE;

        gemm_f32(false, true, end - begin, count, s->dim, 1, s->directions + begin * s->dim, s->dim,
                 s->vectors + (uint64_t)first * s->dim, s->dim, 0, products, ROW_TILE);
        for (uint64_t q = begin; q < end; q++)
            offer_products(s, q, products + (q - begin) * ROW_TILE, first, count);
    }
}

/* ---- by kernels ---- */

static void scan_queries(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct scan *s = context;

    (void)worker;
    for (uint64_t c = begin; c < end; c++) {
        uint32_t q = s->chosen[c];
        struct near *heap = s->heaps + (uint64_t)q * s->heap_max;

        for (uint32_t i = 0; i < s->row_count; i++) {
            const struct near item = {
                store_distance(&s->prepared[c], s->rows + (uint64_t)i * s->row_stride),
                (uint32_t)(s->first_row + i)};

            if (s->heap_counts[q] < s->heap_max || item.distance <= heap[0].distance)
                heap_offer(heap, &s->heap_counts[q], s->heap_max, item);
        }
    }
}

struct encode {
    enum vector_store store;
    enum metric metric;
    uint32_t dim;
    float *rows; /* normalised in place for cosine */
    uint8_t *out;
    uint32_t stride;
};

static void encode_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct encode *e = context;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        float *row = e->rows + i * e->dim;

        if (e->metric == METRIC_COSINE && e->store == STORE_F32)
            vector_normalise(row, e->dim);
        store_encode(e->store, e->metric, row, e->dim, e->out + i * e->stride);
    }
}

static double exact_distance(enum metric metric, const float *q, const float *x, uint32_t dim)
{
    double ip = 0, qq = 0, xx = 0, l2 = 0;

    for (uint32_t d = 0; d < dim; d++) {
        double a = q[d], b = x[d];

        ip += a * b;
        qq += a * a;
        xx += b * b;
        l2 += (a - b) * (a - b);
    }
    if (metric == METRIC_L2)
        return l2;
    if (metric == METRIC_IP)
        return -ip;
    return qq > 0 && xx > 0 ? 1 - ip / sqrt(qq * xx) : 1;
}

static int compare_ranked(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;

    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

/* ---- ranking ---- */

struct rank {
    const struct scan *scan;
    uint32_t k;
    const uint32_t *chosen; /* NULL: all queries */
    float norm_greatest;    /* of the base; with `unsure` alone */
    bool *unsure;           /* of each query, set; NULL: not asked */
    struct truth *out;
    struct error error;
    bool failed;
};

/* Whether a row that was not kept may be nearer than the k-th: `worst` is what the products made of
 * the farthest kept, and a sum of dim products is off by dim roundings at most. */
static bool is_unsure(const struct rank *r, uint64_t query, double distance)
{
    const struct scan *s = r->scan;
    const float *direction = s->directions + query * s->dim;
    double norm2 = (double)distance_kernels_best()->norm2_f32(direction, s->dim);
    double norm = sqrt(norm2), greatest = sqrt((double)r->norm_greatest);
    double off = (s->dim + 8) * (double)FLT_EPSILON * greatest * (2 * norm + greatest);
    double worst = (double)s->heaps[query * s->heap_max].distance;

    if (s->heap_counts[query] < s->heap_max)
        return false; /* all rows are there */
    if (s->metric == METRIC_L2)
        distance -= norm2;
    else if (s->metric == METRIC_COSINE)
        distance -= 1;
    return !(distance + off < worst);
}

static void rank_queries(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct rank *r = context;
    const struct scan *s = r->scan;
    struct error err = ERROR_INIT;
    struct ranked *ranked = malloc(s->heap_max * sizeof *ranked);
    float *row = malloc(s->dim * sizeof *row);

    (void)worker;
    if (!ranked || !row)
        error_set(&err, ERR_NOMEM, "no memory to rank neighbours");
    for (uint64_t i = begin; i < end && !err.code; i++) {
        uint64_t q = r->chosen ? r->chosen[i] : i;
        uint32_t count = s->heap_counts[q];

        for (uint32_t n = 0; n < count; n++) {
            ranked[n].row = s->heaps[q * s->heap_max + n].row;
            if (vector_source_read_f32(s->base, ranked[n].row, 1, row, &err) < 0)
                break;
            ranked[n].distance = exact_distance(s->metric, s->queries + q * s->dim, row, s->dim);
        }
        if (err.code)
            break;
        qsort(ranked, count, sizeof *ranked, compare_ranked);
        for (uint32_t n = 0; n < r->k; n++) {
            double distance = ranked[n].distance;

            r->out->ids[q * r->k + n] = ranked[n].row;
            r->out->distances[q * r->k + n] =
                (float)(s->metric == METRIC_IP ? -distance : distance);
        }
        if (r->unsure)
            r->unsure[q] = is_unsure(r, q, ranked[r->k - 1].distance);
    }
    if (err.code && !__atomic_exchange_n(&r->failed, true, __ATOMIC_ACQ_REL))
        r->error = err;
    free(ranked);
    free(row);
}

static int rank_all(struct scan *s, struct rank *rank, uint32_t count, struct pool *pool,
                    struct error *err)
{
    rank->scan = s;
    pool_for(pool, count, 4, rank_queries, rank);
    if (!rank->failed)
        return 0;
    *err = rank->error;
    return -1;
}

/* ---- passes ---- */

static uint32_t block_rows_of(uint32_t dim)
{
    uint32_t rows = BLOCK_BYTES / (dim * 4);

    return rows ? rows : 1;
}

static int scan_products(struct scan *s, struct pool *pool, struct job *job, float *norm_greatest,
                         struct error *err)
{
    uint64_t rows = vector_source_rows(s->base);
    uint32_t block_rows = block_rows_of(s->dim), workers = pool ? pool_workers(pool) : 1;
    int rc = -1;

    s->vectors = malloc((uint64_t)block_rows * s->dim * sizeof *s->vectors);
    s->norms = malloc(block_rows * sizeof *s->norms);
    s->products = malloc((uint64_t)workers * QUERY_TILE * ROW_TILE * sizeof *s->products);
    s->errors = calloc(workers, sizeof *s->errors);
    s->error_rows = calloc(workers, sizeof *s->error_rows);
    s->norms_greatest = calloc(workers, sizeof *s->norms_greatest);
    if (!s->vectors || !s->norms || !s->products || !s->errors || !s->error_rows ||
        !s->norms_greatest) {
        error_set(err, ERR_NOMEM, "no memory for a block of %u rows", block_rows);
        goto done;
    }
    job_phase(job, "scan", rows);
    for (s->first_row = 0; s->first_row < rows; s->first_row += block_rows) {
        s->row_count =
            rows - s->first_row < block_rows ? (uint32_t)(rows - s->first_row) : block_rows;
        pool_for(pool, s->row_count, 256, read_rows, s);
        if (read_error(s, workers, err) < 0)
            goto done;
        pool_for(pool, s->query_count, QUERY_TILE, multiply_queries, s);
        if (job_advance(job, s->row_count, err) < 0)
            goto done;
    }
    *norm_greatest = 0;
    for (uint32_t w = 0; w < workers; w++)
        if (s->norms_greatest[w] > *norm_greatest)
            *norm_greatest = s->norms_greatest[w];
    rc = 0;
done:
    free(s->vectors);
    free(s->norms);
    free(s->products);
    free(s->errors);
    free(s->error_rows);
    free(s->norms_greatest);
    return rc;
}

static int scan_kernels(struct scan *s, const uint32_t *chosen, uint32_t chosen_count,
                        struct pool *pool, struct job *job, struct error *err)
{
    uint64_t rows = vector_source_rows(s->base);
    enum element_type type = vector_source_type(s->base);
    enum vector_store store = type == ELEMENT_U8   ? STORE_U8
                              : type == ELEMENT_I8 ? STORE_I8
                                                   : STORE_F32;
    uint32_t stride = store_vector_bytes(store, s->metric, s->dim);
    uint32_t block_rows = block_rows_of(s->dim);
    float *vectors = malloc((uint64_t)block_rows * s->dim * sizeof *vectors);
    float *query_vectors = malloc((uint64_t)chosen_count * s->dim * sizeof *query_vectors);
    uint8_t *query_integers = malloc((uint64_t)chosen_count * s->dim);
    uint8_t *encoded = malloc((uint64_t)block_rows * stride);
    int rc = -1;

    s->prepared = calloc(chosen_count, sizeof *s->prepared);
    if (!s->prepared || !vectors || !query_vectors || !query_integers || !encoded) {
        error_set(err, ERR_NOMEM, "no memory to scan for %u queries again", chosen_count);
        goto done;
    }
    for (uint32_t c = 0; c < chosen_count; c++) {
        s->prepared[c].vector = query_vectors + (uint64_t)c * s->dim;
        s->prepared[c].integers = query_integers + (uint64_t)c * s->dim;
        store_query_prepare(&s->prepared[c], distance_kernels_best(), store, s->metric, s->dim,
                            s->queries + (uint64_t)chosen[c] * s->dim);
        s->heap_counts[chosen[c]] = 0;
    }
    s->chosen = chosen;
    s->rows = encoded;
    s->row_stride = stride;
    job_phase(job, "scan again", rows);
    for (s->first_row = 0; s->first_row < rows; s->first_row += block_rows) {
        uint32_t count =
            rows - s->first_row < block_rows ? (uint32_t)(rows - s->first_row) : block_rows;
        struct encode encode = {store, s->metric, s->dim, vectors, encoded, stride};

        if (vector_source_read_f32(s->base, s->first_row, count, vectors, err) < 0)
            goto done;
        pool_for(pool, count, 256, encode_rows, &encode);
        s->row_count = count;
        pool_for(pool, chosen_count, 4, scan_queries, s);
        if (job_advance(job, count, err) < 0)
            goto done;
    }
    rc = 0;
done:
    free(s->prepared);
    free(vectors);
    free(query_vectors);
    free(query_integers);
    free(encoded);
    return rc;
}

int flat_truth(const struct vector_source *base, const float *queries, uint32_t query_count,
               uint32_t k, enum metric metric, struct pool *pool, struct job *job,
               struct truth *out, struct error *err)
{
    uint64_t rows = vector_source_rows(base);
    uint32_t dim = vector_source_dim(base), unsure_count = 0;
    struct scan s = {.base = base,
                     .queries = queries,
                     .metric = metric,
                     .dim = dim,
                     .query_count = query_count,
                     .heap_max = k + MARGIN};
    struct rank rank = {.k = k, .out = out}, again = {.k = k, .out = out};
    bool *unsure = NULL;
    uint32_t *chosen = NULL;
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (k < 1 || k > rows)
        return error_set(err, ERR_INVALID, "k is %u; %s has %llu rows", k, vector_source_name(base),
                         (unsigned long long)rows);
    if (rows > UINT32_MAX)
        return error_set(err, ERR_INVALID, "%s has %llu rows; truth ids have 32 bits",
                         vector_source_name(base), (unsigned long long)rows);
    s.heaps = malloc((uint64_t)query_count * s.heap_max * sizeof *s.heaps);
    s.heap_counts = calloc(query_count, sizeof *s.heap_counts);
    s.directions = malloc((uint64_t)query_count * dim * sizeof *s.directions);
    unsure = calloc(query_count, sizeof *unsure);
    chosen = malloc(query_count * sizeof *chosen);
    out->ids = malloc((uint64_t)query_count * k * sizeof *out->ids);
    out->distances = malloc((uint64_t)query_count * k * sizeof *out->distances);
    if (!s.heaps || !s.heap_counts || !s.directions || !unsure || !chosen || !out->ids ||
        !out->distances) {
        error_set(err, ERR_NOMEM, "no memory for %u queries and k %u", query_count, k);
        goto done;
    }
    out->query_count = query_count;
    out->k = k;
    memcpy(s.directions, queries, (uint64_t)query_count * dim * sizeof *s.directions);
    for (uint32_t q = 0; q < query_count && metric == METRIC_COSINE; q++)
        vector_normalise(s.directions + (uint64_t)q * dim, dim);
    if (scan_products(&s, pool, job, &rank.norm_greatest, err) < 0)
        goto done;
    job_phase(job, "rank", 0);
    rank.unsure = unsure;
    if (rank_all(&s, &rank, query_count, pool, err) < 0)
        goto done;
    for (uint32_t q = 0; q < query_count; q++)
        if (unsure[q])
            chosen[unsure_count++] = q;
    again.chosen = chosen;
    if (unsure_count && (scan_kernels(&s, chosen, unsure_count, pool, job, err) < 0 ||
                         rank_all(&s, &again, unsure_count, pool, err) < 0))
        goto done;
    job_finish(job);
    rc = 0;
done:
    free(s.heaps);
    free(s.heap_counts);
    free(s.directions);
    free(unsure);
    free(chosen);
    if (rc < 0)
        truth_release(out);
    return rc;
}
