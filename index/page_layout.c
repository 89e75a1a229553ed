/* How it works: a node of the tree is a stretch of the order. Its split takes a sample of at most
 * 1024 of its rows, finds two centres by balanced 2-means (each round projects the sample on the
 * line between the centres, cuts it where the whole will be cut, and takes the halves' means), then
 * projects all rows and selects the cut, which is always a multiple of the page's capacity, so only
 * the last page can be partly filled. Of the two ways to put the halves, the one is taken that
 * keeps them nearest to what stands left and right of the stretch: neighbouring pages are often
 * read together.
 *
 * The top of the tree, where nodes are few and large, is split one node at a time with the
 * projection spread over the pool; the subtrees below run in parallel, one worker each. Every node
 * draws its sample from a stream named by its place, so the schedule does not matter. Keys are
 * (projection, row) packed into 64 bits: a total order, NaNs included. */
#include "index/page_layout.h"

#include <stdlib.h>
#include <string.h>

#include "index/vamana_search.h"
#include "storage/base/random.h"

#define SAMPLE_ROWS 1024u
#define MEANS_ROUNDS 6u
#define FARTHEST_TRIES 16u
#define TOP_NODES 64u  /* stretches handed to the workers as whole subtrees */
#define TOP_ROWS 8192u /* smaller stretches are not worth the whole pool */
#define PROJECT_GRAIN 1024u
#define PREFETCH_AHEAD 8u

struct stretch {
    uint32_t begin;
    uint32_t end;
    const float *left; /* centre of what stands before it, NULL at the edge */
    const float *right;
};

struct layout {
    struct row_space space;
    uint32_t capacity;
    uint64_t seed;
    struct pool *pool;
    struct job *job;
    uint32_t *order;
    uint64_t *keys; /* count */
    struct worker_scratch *workers;
    struct stretch *subtrees; /* TOP_NODES */
    uint32_t subtree_count;
};

struct worker_scratch {
    float *direction; /* dim */
    float *buffer;    /* dim, a row as floats */
    float *centres;   /* 2 x dim for every level of the recursion */
    uint64_t *keys;   /* SAMPLE_ROWS */
};

/* ---- selection ---- */

static uint64_t make_key(float projection, uint32_t row)
{
    uint32_t bits;

    memcpy(&bits, &projection, sizeof bits);
    bits ^= bits & 0x80000000u ? 0xffffffffu : 0x80000000u; /* floats' order as integers' */
    return (uint64_t)bits << 32 | row;
}

static void swap(uint64_t *a, uint64_t *b)
{
    uint64_t held = *a;

    *a = *b;
    *b = held;
}

static uint64_t middle_of(uint64_t a, uint64_t b, uint64_t c)
{
    if (a > b)
        swap(&a, &b);
    if (b > c)
        b = c;
    return a > b ? a : b;
}

/* Moves the `left` smallest of distinct keys to the front. */
static void select_keys(uint64_t *keys, uint64_t count, uint64_t left)
{
    while (count > 1 && left > 0 && left < count) {
        uint64_t pivot;
        uint64_t i = 0, j = count - 1;

        /* Nine spread keys: patterns in the input cannot make bad splits common. */
        if (count > 64) {
            uint64_t step = count / 9;

            pivot = middle_of(middle_of(keys[0], keys[step], keys[2 * step]),
                              middle_of(keys[3 * step], keys[4 * step], keys[5 * step]),
                              middle_of(keys[6 * step], keys[7 * step], keys[8 * step]));
        } else {
            pivot = middle_of(keys[0], keys[count / 2], keys[count - 1]);
        }
        for (;;) { /* Hoare: stops at the pivot itself, so i and j stay inside */
            while (keys[i] < pivot)
                i++;
            while (keys[j] > pivot)
                j--;
            if (i >= j)
                break;
            swap(&keys[i++], &keys[j--]);
        }
        /* keys[0..i) <= pivot, keys[i..count) >= pivot; 0 < i < count once moved past it. */
        if (i == 0)
            i = 1;
        if (left < i) {
            count = i;
        } else if (left == i) {
            return;
        } else {
            keys += i;
            count -= i;
            left -= i;
        }
    }
}

static int compare_rows(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

/* ---- one split ---- */

/* One row of each of `sample` equal parts of the stretch. */
static uint32_t draw_sample(const struct layout *layout, const struct stretch *stretch,
                            uint32_t *rows, struct random *random)
{
    uint64_t count = stretch->end - stretch->begin;
    uint32_t sample = count < SAMPLE_ROWS ? (uint32_t)count : SAMPLE_ROWS;

    for (uint32_t i = 0; i < sample; i++) {
        uint64_t from = count * i / sample;
        uint64_t to = count * (i + 1) / sample;

        rows[i] = layout->order[stretch->begin + from + random_below(random, to - from)];
    }
    return sample;
}

static void mean_of(const struct layout *layout, const uint64_t *keys, uint32_t count,
                    float *buffer, float *mean)
{
    uint32_t dim = layout->space.dim;

    memset(mean, 0, dim * sizeof *mean);
    for (uint32_t i = 0; i < count; i++) {
        const float *x = row_space_floats(&layout->space, (uint32_t)keys[i], buffer);

        for (uint32_t d = 0; d < dim; d++)
            mean[d] += x[d];
    }
    for (uint32_t d = 0; d < dim; d++)
        mean[d] /= (float)count;
}

static float gap(const struct layout *layout, const float *a, const float *b)
{
    return a ? layout->space.kernels->l2_f32(a, b, layout->space.dim) : 0;
}

/* Finds the two halves' centres (first, second: dim floats each), in the order they are to stand,
 * and the direction from the first to the second. */
static void find_direction(const struct layout *layout, struct worker_scratch *scratch,
                           const struct stretch *stretch, uint32_t left, float *first,
                           float *second)
{
    const struct row_space *space = &layout->space;
    uint64_t count = stretch->end - stretch->begin;
    uint32_t rows[SAMPLE_ROWS];
    struct random random;
    uint32_t sample, cut, start, far;
    float far_distance = -1;
    float as_is, turned;

    /* A stretch is known by its ends: no two of one tree share both. */
    random_init(&random, layout->seed, (uint64_t)stretch->begin << 32 | stretch->end);
    sample = draw_sample(layout, stretch, rows, &random);
    cut = (uint32_t)((uint64_t)sample * left / count);
    cut = cut < 1 ? 1 : cut > sample - 1 ? sample - 1 : cut;

    start = rows[random_below(&random, sample)];
    far = start;
    for (uint32_t i = 0; i < FARTHEST_TRIES; i++) {
        uint32_t row = rows[random_below(&random, sample)];
        float d = row_space_distance(space, row_space_row(space, start), row_space_row(space, row));

        if (d > far_distance) {
            far_distance = d;
            far = row;
        }
    }
    memcpy(first, row_space_floats(space, start, scratch->buffer), space->dim * sizeof *first);
    memcpy(second, row_space_floats(space, far, scratch->buffer), space->dim * sizeof *second);

    for (uint32_t round = 0; round < MEANS_ROUNDS; round++) {
        for (uint32_t d = 0; d < space->dim; d++)
            scratch->direction[d] = second[d] - first[d];
        for (uint32_t i = 0; i < sample; i++) {
            float projection =
                row_space_float_product(space, scratch->direction, row_space_row(space, rows[i]));

            scratch->keys[i] = make_key(projection, rows[i]);
        }
        select_keys(scratch->keys, sample, cut);
        mean_of(layout, scratch->keys, cut, scratch->buffer, first);
        mean_of(layout, scratch->keys + cut, sample - cut, scratch->buffer, second);
    }

    as_is = gap(layout, stretch->left, first) + gap(layout, stretch->right, second);
    turned = gap(layout, stretch->left, second) + gap(layout, stretch->right, first);
    if (turned < as_is) {
        for (uint32_t d = 0; d < space->dim; d++) {
            float held = first[d];

            first[d] = second[d];
            second[d] = held;
        }
    }
    for (uint32_t d = 0; d < space->dim; d++)
        scratch->direction[d] = second[d] - first[d];
}

struct projection {
    const struct layout *layout;
    const float *direction;
    uint32_t from;
};

static void project(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    const struct projection *projection = context;
    const struct layout *layout = projection->layout;
    const struct row_space *space = &layout->space;
    const uint32_t *rows = layout->order + projection->from;
    uint64_t *keys = layout->keys + projection->from;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        if (i + PREFETCH_AHEAD < end)
            row_space_prefetch(space, rows[i + PREFETCH_AHEAD]);
        keys[i] = make_key(
            row_space_float_product(space, projection->direction, row_space_row(space, rows[i])),
            rows[i]);
    }
}

/* Rows of the stretch that go left; 0 when it is one page. */
static uint32_t left_rows(const struct layout *layout, const struct stretch *stretch)
{
    uint64_t count = stretch->end - stretch->begin;
    uint64_t pages = (count + layout->capacity - 1) / layout->capacity;

    return pages <= 1 ? 0 : (uint32_t)((pages + 1) / 2 * layout->capacity);
}

static void split(const struct layout *layout, struct pool *pool, struct worker_scratch *scratch,
                  const struct stretch *stretch, uint32_t left, float *first, float *second)
{
    struct projection projection = {
        .layout = layout, .direction = scratch->direction, .from = stretch->begin};
    uint32_t count = stretch->end - stretch->begin;
    uint64_t *keys = layout->keys + stretch->begin;

    find_direction(layout, scratch, stretch, left, first, second);
    pool_for(pool, count, PROJECT_GRAIN, project, &projection);
    select_keys(keys, count, left);
    for (uint32_t i = 0; i < count; i++)
        layout->order[stretch->begin + i] = (uint32_t)keys[i];
}

/* ---- the tree ---- */

static void lay_out_subtree(const struct layout *layout, struct worker_scratch *scratch,
                            const struct stretch *stretch, float *centres)
{
    uint32_t left = left_rows(layout, stretch);
    uint32_t count = stretch->end - stretch->begin;
    float *first = centres;
    float *second = centres + layout->space.dim;
    struct stretch half;

    if (left == 0) {
        qsort(layout->order + stretch->begin, count, sizeof *layout->order, compare_rows);
        job_advance(layout->job, count, NULL);
        return;
    }
    if (job_cancelled(layout->job))
        return;
    split(layout, NULL, scratch, stretch, left, first, second);
    half = (struct stretch){stretch->begin, stretch->begin + left, stretch->left, second};
    lay_out_subtree(layout, scratch, &half, second + layout->space.dim);
    half = (struct stretch){stretch->begin + left, stretch->end, first, stretch->right};
    lay_out_subtree(layout, scratch, &half, second + layout->space.dim);
}

static void lay_out_subtrees(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct layout *layout = context;
    struct worker_scratch *scratch = &layout->workers[worker];

    for (uint64_t i = begin; i < end; i++)
        lay_out_subtree(layout, scratch, &layout->subtrees[i], scratch->centres);
}

/* Splits the stretches, all of them once a round, while they are few and large. centres: room for
 * TOP_NODES x 2 x dim floats, two for each split. */
static void lay_out_top(struct layout *layout, float *centres)
{
    struct stretch next[TOP_NODES];
    uint32_t splits = 0;
    bool again = true;

    while (again && 2 * layout->subtree_count <= TOP_NODES) {
        uint32_t count = 0;

        again = false;
        for (uint32_t i = 0; i < layout->subtree_count; i++) {
            struct stretch stretch = layout->subtrees[i];
            uint32_t left = left_rows(layout, &stretch);
            float *first = centres + (uint64_t)splits * 2 * layout->space.dim;
            float *second = first + layout->space.dim;

            if (left == 0 || stretch.end - stretch.begin < TOP_ROWS || job_cancelled(layout->job)) {
                next[count++] = stretch;
                continue;
            }
            split(layout, layout->pool, &layout->workers[0], &stretch, left, first, second);
            splits++;
            next[count++] =
                (struct stretch){stretch.begin, stretch.begin + left, stretch.left, second};
            next[count++] =
                (struct stretch){stretch.begin + left, stretch.end, first, stretch.right};
            again = true;
        }
        memcpy(layout->subtrees, next, count * sizeof *next);
        layout->subtree_count = count;
    }
}

/* Levels of the tree: each halves the pages, rounded up. */
static uint32_t tree_levels(uint32_t count, uint32_t capacity)
{
    uint64_t pages = ((uint64_t)count + capacity - 1) / capacity;
    uint32_t levels = 0;

    for (; pages > 1; pages = (pages + 1) / 2)
        levels++;
    return levels;
}

static void release(struct layout *layout, uint32_t workers)
{
    for (uint32_t i = 0; layout->workers && i < workers; i++) {
        free(layout->workers[i].direction);
        free(layout->workers[i].buffer);
        free(layout->workers[i].centres);
        free(layout->workers[i].keys);
    }
    free(layout->workers);
    free(layout->keys);
    free(layout->subtrees);
}

static int prepare(struct layout *layout, uint32_t workers, struct error *err)
{
    uint64_t dim = layout->space.dim;
    uint32_t levels = tree_levels(layout->space.count, layout->capacity);

    layout->keys = malloc((size_t)layout->space.count * sizeof *layout->keys);
    layout->subtrees = malloc(TOP_NODES * sizeof *layout->subtrees);
    layout->workers = calloc(workers, sizeof *layout->workers);
    if (!layout->keys || !layout->subtrees || !layout->workers)
        goto nomem;
    for (uint32_t i = 0; i < workers; i++) {
        struct worker_scratch *scratch = &layout->workers[i];

        scratch->direction = malloc(dim * sizeof(float));
        scratch->buffer = malloc(dim * sizeof(float));
        scratch->centres = malloc((levels + 1) * 2 * dim * sizeof(float));
        scratch->keys = malloc(SAMPLE_ROWS * sizeof *scratch->keys);
        if (!scratch->direction || !scratch->buffer || !scratch->centres || !scratch->keys)
            goto nomem;
    }
    return 0;
nomem:
    return error_set(err, ERR_NOMEM, "page order: no memory for %u rows", layout->space.count);
}

int page_layout_order(const struct vector_matrix *vectors, uint32_t capacity, uint64_t seed,
                      struct pool *pool, struct job *job, uint32_t *order, struct error *err)
{
    struct layout layout = {
        .capacity = capacity, .seed = seed, .pool = pool, .job = job, .order = order};
    uint32_t workers = pool ? pool_workers(pool) : 1;
    float *top_centres = NULL;
    int rc = -1;

    if (row_space_init(&layout.space, vectors, err) < 0)
        goto done;
    if (capacity == 0) {
        error_set(err, ERR_INVALID, "page order: a page has to hold at least one row");
        goto done;
    }
    if (prepare(&layout, workers, err) < 0)
        goto done;
    top_centres = malloc((size_t)TOP_NODES * 2 * vectors->dim * sizeof *top_centres);
    if (!top_centres) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u centres", TOP_NODES * 2);
        goto done;
    }
    job_phase(job, "page order", vectors->count);
    for (uint32_t row = 0; row < vectors->count; row++)
        order[row] = row;
    layout.subtrees[0] = (struct stretch){0, vectors->count, NULL, NULL};
    layout.subtree_count = 1;
    lay_out_top(&layout, top_centres);
    pool_for(pool, layout.subtree_count, 1, lay_out_subtrees, &layout);
    rc = job_advance(job, 0, err);
done:
    free(top_centres);
    release(&layout, workers);
    return rc;
}
