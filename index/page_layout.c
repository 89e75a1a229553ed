/* How it works, space order: a node of the tree is a stretch of the order. Its split takes a sample
 * of at most 1024 of its rows, finds two centres by balanced 2-means (each round projects the
 * sample on the line between the centres, cuts it where the whole will be cut, and takes the
 * halves' means), then projects all rows and selects the cut, which is always a multiple of the
 * page's capacity, so only the last page can be partly filled. Of the two ways to put the halves,
 * the one is taken that keeps them nearest to what stands left and right of the stretch:
 * neighbouring pages are often read together.
 *
 * Hot tiers, the cold rest and the rows apart are groups: trees of their own, each over its stretch
 * of the order. The top of a tree, where nodes are few and large, is split one node at a time with
 * the projection spread over the pool; the subtrees below run in parallel, one worker each. Every
 * node draws its sample from a stream named by its place, so the schedule does not matter. Keys are
 * (projection, row) packed into 64 bits: a total order, NaNs included.
 *
 * Refinement: two rows of two pages trade places when more pairs of neighbours then share a page
 * (Kernighan, Lin, "An Efficient Heuristic Procedure for Partitioning Graphs", 1970, with pages as
 * parts). In a round every page, in parallel, counts its links to other pages, looks closely at
 * those pages where the counts say that a trade could pay, and offers the best trade with each.
 * Then the offers are taken up one by one, the most gainful first, each weighed anew, since those
 * before it may have changed what it gains (all of one gain at once, in parallel, and again those
 * that a trade among them touched). So the number of pairs that share a page only ever
 * grows, pages stay full and stay where they are. Compared with Starling's rounds, which assign
 * every row anew, it ends with more such pairs, and nothing is left over. Pages that took part in
 * no trade of a round are not looked at in the next: no other change can make a trade between two
 * such pages pay. */
#include "index/page_layout.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "index/vamana_search.h"
#include "storage/base/bytes.h"
#include "storage/base/random.h"

#define SAMPLE_ROWS 1024u
#define MEANS_ROUNDS 6u
#define FARTHEST_TRIES 16u
#define TOP_NODES 128u /* stretches handed to the workers as whole subtrees, at most */
#define TOP_NODES_WORKER 8u
#define TOP_ROWS 8192u /* smaller stretches are not worth the whole pool */
#define PROJECT_GRAIN 1024u
#define PREFETCH_AHEAD 8u
#define GROUPS_MAX (PAGE_LAYOUT_TIERS_MAX + 2) /* tiers, the rest, the rows apart */
#define HOT_PLACES 12u        /* of the neighbour lists, that say how hot a row is */
#define REFINE_PLACES 24u     /* of the neighbour lists, that refinement counts */
#define VISIT_GRAIN 64u       /* pages */
#define WEIGH_GRAIN 512u      /* pages */
#define LIST_BYTES (1u << 20) /* of the neighbour lists, that are read at once */
#define LIST_GRAIN 512u       /* rows */
#define READ_GRAIN 1024u      /* rows, of vectors */
#define HUGE_BYTES (2u << 20)
#define WINDOW_ROWS_MIN 65536u
#define WINDOW_ROWS_MAX (1u << 26)  /* with REFINE_PLACES both ways: links count in 32 bits */
#define SHORT_LINKS_ROWS (1u << 24) /* up to so many, a link takes three bytes */
#define NOWHERE UINT32_MAX

struct stretch {
    uint32_t begin;
    uint32_t end;
    const float *left; /* centre of what stands before it, NULL at the edge */
    const float *right;
};

/* One window, rows known by their numbers in `space`. */
struct layout {
    struct row_space space;
    uint32_t capacity;
    uint64_t seed;
    struct pool *pool;
    struct job *job;
    uint32_t *order; /* row_count */
    uint32_t row_count;
    uint64_t *keys; /* row_count */
    struct worker_scratch *workers;
    uint32_t worker_count;
    struct stretch *subtrees; /* TOP_NODES */
    uint32_t subtree_count;
    struct stretch groups[GROUPS_MAX]; /* of order, one after the other */
    uint32_t group_count;
};

struct worker_scratch {
    float *direction; /* dim */
    float *buffer;    /* dim, a row as floats */
    float *centres;   /* 2 x dim for every level of the recursion */
    uint32_t *sums;   /* dim */
    uint16_t *part;   /* dim */
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

/* Sums of SAMPLE_ROWS bytes are exact as floats too: the mean is the one that mean_of would take,
 * only sooner. */
#define PART_ROWS 128u /* so many of either kind fit 16 bits */
static_assert(SAMPLE_ROWS * 255u < 1u << 24, "sums of bytes have to be exact as floats");

static void mean_of_bytes(const struct layout *layout, const uint64_t *keys, uint32_t count,
                          struct worker_scratch *scratch, float *mean)
{
    bool is_signed = layout->space.type == ELEMENT_I8;
    uint32_t dim = layout->space.dim;

    memset(scratch->sums, 0, dim * sizeof *scratch->sums);
    for (uint32_t begin = 0; begin < count; begin += PART_ROWS) {
        uint32_t end = count - begin < PART_ROWS ? count : begin + PART_ROWS;
        uint16_t *part = scratch->part;

        memset(part, 0, dim * sizeof *part);
        for (uint32_t i = begin; i < end; i++) {
            const uint8_t *x = row_space_row(&layout->space, (uint32_t)keys[i]);

            /* i8: 128 more than it is, taken off below. */
            for (uint32_t d = 0; d < dim; d++)
                part[d] += is_signed ? x[d] ^ 0x80 : x[d];
        }
        for (uint32_t d = 0; d < dim; d++)
            scratch->sums[d] += part[d];
    }
    for (uint32_t d = 0; d < dim; d++) {
        int32_t sum = (int32_t)scratch->sums[d] - (is_signed ? (int32_t)(128 * count) : 0);

        mean[d] = (float)sum / (float)count;
    }
}

static void mean_of(const struct layout *layout, const uint64_t *keys, uint32_t count,
                    struct worker_scratch *scratch, float *mean)
{
    uint32_t dim = layout->space.dim;

    if (layout->space.type == ELEMENT_U8 || layout->space.type == ELEMENT_I8) {
        mean_of_bytes(layout, keys, count, scratch, mean);
        return;
    }
    memset(mean, 0, dim * sizeof *mean);
    for (uint32_t i = 0; i < count; i++) {
        const float *x = row_space_floats(&layout->space, (uint32_t)keys[i], scratch->buffer);

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
        mean_of(layout, scratch->keys, cut, scratch, first);
        mean_of(layout, scratch->keys + cut, sample - cut, scratch, second);
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
    uint32_t nodes = TOP_NODES_WORKER * layout->worker_count;
    uint32_t splits = 0;
    bool again = layout->worker_count > 1;

    nodes = nodes < TOP_NODES ? nodes : TOP_NODES;
    while (again) {
        uint32_t count = 0;

        again = false;
        for (uint32_t i = 0; i < layout->subtree_count; i++) {
            struct stretch stretch = layout->subtrees[i];
            uint32_t left = left_rows(layout, &stretch);
            uint32_t waiting = layout->subtree_count - i - 1;
            float *first = centres + (uint64_t)splits * 2 * layout->space.dim;
            float *second = first + layout->space.dim;

            if (left == 0 || stretch.end - stretch.begin < TOP_ROWS ||
                count + 2 + waiting > nodes || job_cancelled(layout->job)) {
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

static void release(struct layout *layout)
{
    for (uint32_t i = 0; layout->workers && i < layout->worker_count; i++) {
        free(layout->workers[i].direction);
        free(layout->workers[i].buffer);
        free(layout->workers[i].centres);
        free(layout->workers[i].sums);
        free(layout->workers[i].part);
        free(layout->workers[i].keys);
    }
    free(layout->workers);
    free(layout->keys);
    free(layout->subtrees);
    layout->workers = NULL;
    layout->keys = NULL;
    layout->subtrees = NULL;
}

static int prepare(struct layout *layout, struct error *err)
{
    uint64_t dim = layout->space.dim;
    uint32_t levels = tree_levels(layout->row_count, layout->capacity);

    layout->keys = malloc((size_t)layout->row_count * sizeof *layout->keys);
    layout->subtrees = malloc(TOP_NODES * sizeof *layout->subtrees);
    layout->workers = calloc(layout->worker_count, sizeof *layout->workers);
    if (!layout->keys || !layout->subtrees || !layout->workers)
        goto nomem;
    for (uint32_t i = 0; i < layout->worker_count; i++) {
        struct worker_scratch *scratch = &layout->workers[i];

        scratch->direction = malloc(dim * sizeof(float));
        scratch->buffer = malloc(dim * sizeof(float));
        scratch->centres = malloc((levels + 1) * 2 * dim * sizeof(float));
        scratch->sums = malloc(dim * sizeof *scratch->sums);
        scratch->part = malloc(dim * sizeof *scratch->part);
        scratch->keys = malloc(SAMPLE_ROWS * sizeof *scratch->keys);
        if (!scratch->direction || !scratch->buffer || !scratch->centres || !scratch->sums ||
            !scratch->part || !scratch->keys)
            goto nomem;
    }
    return 0;
nomem:
    return error_set(err, ERR_NOMEM, "page order: no memory for %u rows", layout->row_count);
}

/* Lays out every group of the window, each a tree of its own. */
static int lay_out_groups(struct layout *layout, struct error *err)
{
    float *top_centres = malloc((size_t)TOP_NODES * 2 * layout->space.dim * sizeof *top_centres);
    int rc = -1;

    if (!top_centres) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u centres", TOP_NODES * 2);
        goto done;
    }
    if (prepare(layout, err) < 0)
        goto done;
    layout->subtree_count = 0;
    for (uint32_t i = 0; i < layout->group_count; i++) {
        if (layout->groups[i].begin < layout->groups[i].end)
            layout->subtrees[layout->subtree_count++] = layout->groups[i];
    }
    lay_out_top(layout, top_centres);
    pool_for(layout->pool, layout->subtree_count, 1, lay_out_subtrees, layout);
    rc = job_advance(layout->job, 0, err);
done:
    free(top_centres);
    release(layout);
    return rc;
}

/* ---- neighbour lists, in pieces ---- */

static uint32_t list_rows(uint32_t k)
{
    uint32_t rows = LIST_BYTES / (k < LIST_BYTES / 4 ? k * 4 : LIST_BYTES);

    return rows > 0 ? rows : 1;
}

/* Part of the lists, and what is done with them. */
struct list_pass {
    const struct page_neighbours *neighbours;
    uint32_t *lists;
    uint32_t first; /* row of lists[0] */
    uint32_t places;
    uint32_t count; /* rows that there are: the end of a list has none of them */
    void *context;  /* of the pass, */
    void (*row)(const struct list_pass *pass, uint32_t row, const uint32_t *list); /* any thread */
};

static void pass_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    const struct list_pass *pass = context;

    (void)worker;
    for (uint64_t i = begin; i < end; i++)
        pass->row(pass, pass->first + (uint32_t)i, pass->lists + i * pass->neighbours->k);
}

/* Calls pass->row for rows [first, end). */
static int pass_over(struct list_pass *pass, uint32_t first, uint32_t end, struct pool *pool,
                     struct job *job, struct error *err)
{
    uint32_t at_once = list_rows(pass->neighbours->k);

    while (first < end) {
        uint32_t rows = end - first < at_once ? end - first : at_once;

        if (pass->neighbours->read(pass->neighbours->context, first, rows, pass->lists, err) < 0)
            return -1;
        pass->first = first;
        pool_for(pool, rows, LIST_GRAIN, pass_rows, pass);
        if (job_advance(job, 0, err) < 0)
            return -1;
        first += rows;
    }
    return 0;
}

static uint64_t list_memory_bytes(uint64_t count, uint32_t k)
{
    uint64_t rows = list_rows(k);

    return (rows < count ? rows : count) * k * sizeof(uint32_t);
}

static int list_pass_init(struct list_pass *pass, const struct page_neighbours *neighbours,
                          uint32_t places, uint32_t count, struct error *err)
{
    uint64_t bytes = list_memory_bytes(count, neighbours->k);

    pass->neighbours = neighbours;
    pass->places = neighbours->k < places ? neighbours->k : places;
    pass->count = count;
    pass->lists = malloc(bytes);
    return pass->lists
               ? 0
               : error_set(err, ERR_NOMEM, "page order: no memory for lists of %u", neighbours->k);
}

static int read_array(void *context, uint32_t first, uint32_t count, uint32_t *lists,
                      struct error *err)
{
    const struct neighbour_lists *from = context;

    (void)err;
    memcpy(lists, from->rows + (uint64_t)first * from->k,
           (uint64_t)count * from->k * sizeof *lists);
    return 0;
}

struct page_neighbours page_neighbours_of_lists(const struct neighbour_lists *lists)
{
    return (struct page_neighbours){
        .k = lists->k, .read = read_array, .context = (void *)(uintptr_t)lists};
}

/* ---- groups ---- */

static int check_params(uint32_t count, const struct page_layout_params *params,
                        const struct page_neighbours *neighbours, struct error *err)
{
    uint32_t taking_part, before = 0;

    if (params->capacity == 0)
        return error_set(err, ERR_INVALID, "page order: a page has to hold at least one row");
    if (params->apart_count > count ||
        (params->apart_count > 0 && (count - params->apart_count) % params->capacity != 0))
        return error_set(err, ERR_INVALID,
                         "page order: %u rows apart from %u leave no whole pages of %u",
                         params->apart_count, count, params->capacity);
    if (params->tier_count > PAGE_LAYOUT_TIERS_MAX)
        return error_set(err, ERR_INVALID, "page order: %u hot tiers, at most %u can be",
                         params->tier_count, PAGE_LAYOUT_TIERS_MAX);
    taking_part = count - params->apart_count;
    for (uint32_t i = 0; i < params->tier_count; i++) {
        uint32_t end = params->tier_ends[i];

        if (end <= before || end > taking_part || end % params->capacity != 0)
            return error_set(err, ERR_INVALID,
                             "page order: hot tier %u ends at row %u after %u, of %u rows in "
                             "pages of %u",
                             i, end, before, taking_part, params->capacity);
        before = end;
    }
    if (!neighbours)
        return params->tier_count == 0
                   ? 0
                   : error_set(err, ERR_INVALID, "page order: hot tiers need neighbour lists");
    if (neighbours->k == 0)
        return error_set(err, ERR_INVALID, "page order: neighbour lists of no places");
    return 0;
}

/* What the groups are made of: two passes over all rows, the second in memory. */
struct grouping {
    uint32_t count;
    uint8_t *group_of; /* count */
    uint32_t *degrees; /* count: in how many lists of rows that take part a row stands */
    uint8_t apart;     /* the group of the rows apart */
    uint32_t *high;    /* 65,536: rows of a degree's upper half, */
    uint32_t *low;     /* and of its lower half, */
    uint32_t low_of;   /* among those of this upper half */
};

static void count_degrees(const struct list_pass *pass, uint32_t row, const uint32_t *list)
{
    const struct grouping *g = pass->context;

    for (uint32_t i = 0; g->group_of[row] != g->apart && i < pass->places && list[i] < pass->count;
         i++)
        __atomic_fetch_add(&g->degrees[list[i]], 1, __ATOMIC_RELAXED);
}

static void count_low(struct grouping *g, uint32_t high)
{
    if (g->low_of == high)
        return;
    memset(g->low, 0, 65536 * sizeof *g->low);
    for (uint32_t row = 0; row < g->count; row++) {
        if (g->group_of[row] != g->apart && g->degrees[row] >> 16 == high)
            g->low[g->degrees[row] & 0xffff]++;
    }
    g->low_of = high;
}

/* The degree of the row that is last of the `rank` hottest, and how many of its degree are among
 * them. */
static uint32_t degree_at(struct grouping *g, uint32_t rank, uint32_t *ties)
{
    uint32_t high = 65535, low = 65535;

    for (; g->high[high] < rank; high--)
        rank -= g->high[high];
    count_low(g, high);
    for (; g->low[low] < rank; low--)
        rank -= g->low[low];
    *ties = rank;
    return high << 16 | low;
}

/* The hottest rows into the tiers: by degree, then by row. */
static void cut_tiers(struct grouping *g, const struct page_layout_params *params)
{
    uint32_t lowest[PAGE_LAYOUT_TIERS_MAX], ties[PAGE_LAYOUT_TIERS_MAX];

    g->low_of = UINT32_MAX;
    for (uint32_t row = 0; row < g->count; row++)
        g->high[g->degrees[row] >> 16] += g->group_of[row] != g->apart;
    for (uint32_t i = 0; i < params->tier_count; i++)
        lowest[i] = degree_at(g, params->tier_ends[i], &ties[i]);
    for (uint32_t row = 0; row < g->count; row++) {
        uint32_t degree = g->degrees[row];

        if (g->group_of[row] == g->apart)
            continue;
        /* The last tiers first: a row of one is of all behind it, and ends in the foremost. */
        for (uint32_t i = params->tier_count; i-- > 0;) {
            if (degree > lowest[i] || (degree == lowest[i] && ties[i] > 0)) {
                g->group_of[row] = (uint8_t)i;
                ties[i] -= degree == lowest[i];
            }
        }
    }
}

/* Which group every row stands in, into group_of. */
static int assign_groups(struct grouping *g, const struct page_layout_params *params,
                         const struct page_neighbours *neighbours, struct pool *pool,
                         struct job *job, struct error *err)
{
    struct list_pass pass = {.context = g, .row = count_degrees};
    int rc = -1;

    g->apart = (uint8_t)(params->tier_count + 1);
    memset(g->group_of, (uint8_t)params->tier_count, g->count);
    for (uint32_t i = 0; i < params->apart_count; i++) {
        uint32_t row = params->apart[i];

        if (row >= g->count || g->group_of[row] == g->apart)
            return error_set(err, ERR_INVALID, "page order: row %u apart is %s", row,
                             row >= g->count ? "not there" : "named twice");
        g->group_of[row] = g->apart;
    }
    if (params->tier_count == 0)
        return 0;
    g->degrees = calloc(g->count, sizeof *g->degrees);
    g->high = calloc(65536, sizeof *g->high);
    g->low = malloc(65536 * sizeof *g->low);
    if (!g->degrees || !g->high || !g->low) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u counts", g->count);
        goto done;
    }
    if (list_pass_init(&pass, neighbours, HOT_PLACES, g->count, err) < 0 ||
        pass_over(&pass, 0, g->count, pool, job, err) < 0)
        goto done;
    cut_tiers(g, params);
    rc = 0;
done:
    free(pass.lists);
    free(g->degrees);
    free(g->high);
    free(g->low);
    return rc;
}

/* Fills ends[group], and the order with each group's rows, ascending. */
static int make_groups(const struct page_layout_params *params, uint32_t count,
                       const struct page_neighbours *neighbours, struct pool *pool, struct job *job,
                       uint32_t *order, uint32_t *ends, struct error *err)
{
    struct grouping g = {.count = count, .group_of = malloc(count)};
    uint32_t next[GROUPS_MAX];
    int rc = -1;

    if (!g.group_of) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u rows", count);
        goto done;
    }
    if (assign_groups(&g, params, neighbours, pool, job, err) < 0)
        goto done;
    for (uint32_t i = 0; i < params->tier_count + 2; i++) {
        ends[i] = i < params->tier_count    ? params->tier_ends[i]
                  : i == params->tier_count ? count - params->apart_count
                                            : count;
        next[i] = i == 0 ? 0 : ends[i - 1];
    }
    for (uint32_t row = 0; row < count; row++)
        order[next[g.group_of[row]]++] = row;
    rc = 0;
done:
    free(g.group_of);
    return rc;
}

/* ---- refinement ---- */

/* A window's rows: ascending numbers, those carried over from windows before and then a stretch. */
struct window {
    uint32_t first; /* rows [first, end), after */
    uint32_t end;
    uint32_t carried_count; /* the carried ones, all of them below first */
    uint32_t *carried;
};

/* Rows are known by their position in the window's order as it was before: near rows have near
 * numbers. Links are pairs of rows of one group, one of which lists the other, seen from both ends;
 * a pair that lists each other has two. What a round does with a row's links does not depend on
 * how they are sorted. */
struct refinement {
    const struct layout *layout;
    const struct window *window;
    uint32_t *positions; /* of the window's rows, while links are made; NOWHERE: takes no part */
    uint32_t capacity;
    uint32_t slot_bits;
    uint32_t *link_ends; /* count + 1: links of row i stand from link_ends[i] to the next */
    uint8_t *links;      /* link_bytes each */
    uint32_t link_bytes;
    uint32_t link_mask;
    struct place *places;   /* count */
    uint32_t *members;      /* count: members[page * capacity + slot] */
    uint32_t *lowest;       /* pages: the smallest `inside` of a page's rows as a round begins */
    uint8_t *waiting;       /* pages: to be visited */
    uint8_t *changed;       /* pages: by trades of the present gain */
    struct trade *offers;   /* count: up to capacity a page, the most gainful first */
    uint32_t *offer_counts; /* pages */
    uint32_t *cursors;      /* pages: offers that were weighed */
    struct visit *visits;   /* workers */
    uint32_t page_count;
    int32_t gain; /* of the offers that are being taken up */
    bool failed;  /* memory is out; set by any worker, read after the loop */
};

struct trade {
    int32_t gain; /* pairs of neighbours that share a page only after it */
    uint32_t row;
    uint32_t other_row;
    uint32_t other; /* the page of other_row when the trade was found */
};

/* Where a row stands. */
struct place {
    uint32_t at;     /* page << slot_bits | slot */
    uint32_t inside; /* links to rows on the same page */
};

/* Links from the visited page to another. */
struct page_links {
    uint32_t page;
    uint32_t count;
    uint32_t first;
    uint32_t slot;          /* of the visited page, whose links were counted last */
    uint32_t slot_links;    /* and how many they are */
    int32_t most_gained;    /* of any row of the visited page by going there */
    uint32_t lowest_inside; /* of the rows linked to there */
};

/* What one worker needs to visit a page. */
struct visit {
    uint32_t *numbers; /* pages: 1 + where it stands in `pages`, 0 if it has no links */
    struct page_links *pages;
    uint32_t *from;       /* per link: its slot on the visited page, */
    uint32_t *to;         /* the row at the other end */
    uint32_t *next;       /* and the next link to the same page */
    struct trade *trades; /* the best with each of the pages */
    uint64_t room;        /* of the last five */
    int32_t *gains;       /* 2 x capacity */
};

static uint32_t page_of(const struct refinement *r, uint32_t row)
{
    return r->places[row].at >> r->slot_bits;
}

static uint32_t slot_of(const struct refinement *r, uint32_t row)
{
    return r->places[row].at & ((1u << r->slot_bits) - 1);
}

static uint32_t link_at(const struct refinement *r, uint64_t link)
{
    return load_u32(r->links + link * r->link_bytes) & r->link_mask;
}

static uint32_t page_rows(const struct refinement *r, uint32_t page)
{
    uint64_t begin = (uint64_t)page * r->capacity;
    uint64_t left = r->layout->row_count - begin;

    return left < r->capacity ? (uint32_t)left : r->capacity;
}

static const uint32_t *page_members(const struct refinement *r, uint32_t page)
{
    return r->members + (uint64_t)page * r->capacity;
}

static void find_lowest(struct refinement *r, uint32_t page)
{
    const uint32_t *members = page_members(r, page);
    uint32_t rows = page_rows(r, page);
    uint32_t lowest = UINT32_MAX;

    for (uint32_t i = 0; i < rows; i++)
        lowest = r->places[members[i]].inside < lowest ? r->places[members[i]].inside : lowest;
    r->lowest[page] = lowest;
}

static bool visit_grow(struct visit *visit, uint64_t room)
{
    if (room <= visit->room)
        return true;
    free(visit->pages);
    free(visit->from);
    free(visit->to);
    free(visit->next);
    free(visit->trades);
    visit->pages = malloc(room * sizeof *visit->pages);
    visit->from = malloc(room * sizeof *visit->from);
    visit->to = malloc(room * sizeof *visit->to);
    visit->next = malloc(room * sizeof *visit->next);
    visit->trades = malloc(room * sizeof *visit->trades);
    visit->room =
        visit->pages && visit->from && visit->to && visit->next && visit->trades ? room : 0;
    return visit->room > 0;
}

static void visit_release(struct visit *visit)
{
    free(visit->numbers);
    free(visit->pages);
    free(visit->from);
    free(visit->to);
    free(visit->next);
    free(visit->trades);
    free(visit->gains);
}

/* Links between two rows; the visited page's links to the other's page start at `link`. */
static int32_t links_between(const struct visit *visit, uint32_t link, uint32_t slot,
                             uint32_t other)
{
    int32_t count = 0;

    for (; link != UINT32_MAX; link = visit->next[link])
        count += visit->from[link] == slot && visit->to[link] == other;
    return count;
}

/* The best trade between two pages; its gain is 0 if none pays. */
static struct trade find_trade(const struct refinement *r, const struct visit *visit, uint32_t page,
                               const struct page_links *links)
{
    uint32_t other = links->page;
    const uint32_t *members = page_members(r, page), *others = page_members(r, other);
    uint32_t rows = page_rows(r, page), other_rows = page_rows(r, other);
    int32_t *gains = visit->gains, *other_gains = visit->gains + r->capacity;
    uint32_t first = links->first;
    struct trade best = {0};
    int32_t most = INT32_MIN / 2;

    for (uint32_t i = 0; i < rows; i++)
        gains[i] = -(int32_t)r->places[members[i]].inside;
    for (uint32_t i = 0; i < other_rows; i++)
        other_gains[i] = -(int32_t)r->places[others[i]].inside;
    for (uint32_t link = first; link != UINT32_MAX; link = visit->next[link]) {
        gains[visit->from[link]]++;
        other_gains[slot_of(r, visit->to[link])]++;
    }
    for (uint32_t i = 0; i < other_rows; i++)
        most = other_gains[i] > most ? other_gains[i] : most;
    for (uint32_t i = 0; i < rows; i++) {
        for (uint32_t j = 0; gains[i] + most > best.gain && j < other_rows; j++) {
            int32_t gain = gains[i] + other_gains[j];

            /* Links between the two lead to another page before the trade and after it. */
            if (gain > best.gain)
                gain -= 2 * links_between(visit, first, i, others[j]);
            if (gain > best.gain)
                best = (struct trade){gain, members[i], others[j], other};
        }
    }
    return best;
}

/* Row leaves page for other; the rows of both pages have their inner links counted again. */
static void move_row(struct refinement *r, uint32_t row, uint32_t page, uint32_t other,
                     uint32_t slot)
{
    uint32_t inside = 0;

    for (uint32_t i = r->link_ends[row]; i < r->link_ends[row + 1]; i++) {
        struct place *place = &r->places[link_at(r, i)];
        uint32_t at = place->at >> r->slot_bits;

        if (at == page) {
            place->inside--;
        } else if (at == other) {
            place->inside++;
            inside++;
        }
    }
    r->places[row] = (struct place){other << r->slot_bits | slot, inside};
    r->members[(uint64_t)other * r->capacity + slot] = row;
}

static void make_trade(struct refinement *r, const struct trade *trade)
{
    uint32_t page = page_of(r, trade->row), other = page_of(r, trade->other_row);
    uint32_t slot = slot_of(r, trade->row), other_slot = slot_of(r, trade->other_row);

    move_row(r, trade->row, page, other, other_slot);
    move_row(r, trade->other_row, other, page, slot);
    r->waiting[page] = 1;
    r->waiting[other] = 1;
    r->changed[page] = 1;
    r->changed[other] = 1;
}

static void list_link(struct visit *visit, struct page_links *links, uint32_t link, uint32_t slot,
                      uint32_t inside, uint32_t to, uint32_t to_inside)
{
    int32_t gained;

    if (links->slot != slot) {
        links->slot = slot;
        links->slot_links = 0;
    }
    gained = (int32_t)++links->slot_links - (int32_t)inside;
    if (gained > links->most_gained)
        links->most_gained = gained;
    if (to_inside < links->lowest_inside)
        links->lowest_inside = to_inside;
    visit->from[link] = slot;
    visit->to[link] = to;
    visit->next[link] = links->first;
    links->first = link;
    links->count++;
}

/* Lists the page's links to other pages: returns the number of those pages, or -1 without memory.
 */
static int64_t list_links(const struct refinement *r, struct visit *visit, uint32_t page)
{
    const uint32_t *members = page_members(r, page);
    uint32_t rows = page_rows(r, page);
    uint64_t room = 0;
    uint32_t links = 0, pages = 0;

    for (uint32_t slot = 0; slot < rows; slot++)
        room += r->link_ends[members[slot] + 1] - r->link_ends[members[slot]];
    if (room >= UINT32_MAX || !visit_grow(visit, room))
        return room == 0 ? 0 : -1;
    for (uint32_t slot = 0; slot < rows; slot++) {
        uint32_t inside = r->places[members[slot]].inside;
        uint64_t end = r->link_ends[members[slot] + 1];

        for (uint64_t i = r->link_ends[members[slot]]; i < end; i++) {
            uint32_t to = link_at(r, i);
            struct place place = r->places[to];
            uint32_t other = place.at >> r->slot_bits;
            uint32_t number;

            if (i + PREFETCH_AHEAD < end)
                __builtin_prefetch(&r->places[link_at(r, i + PREFETCH_AHEAD)]);
            if (other == page)
                continue;
            number = visit->numbers[other];
            if (number == 0) {
                visit->pages[pages++] = (struct page_links){.page = other,
                                                            .first = UINT32_MAX,
                                                            .slot = UINT32_MAX,
                                                            .most_gained = INT32_MIN,
                                                            .lowest_inside = UINT32_MAX};
                visit->numbers[other] = number = pages;
            }
            list_link(visit, &visit->pages[number - 1], links++, slot, inside, to, place.inside);
        }
    }
    for (uint32_t i = 0; i < pages; i++)
        visit->numbers[visit->pages[i].page] = 0;
    return pages;
}

/* No trade of the two pages gains more. Most pages that are linked are so by one link: then it
 * either brings its row of this page in, or the other one out, not both. */
static int64_t most_to_gain(const struct refinement *r, uint32_t page,
                            const struct page_links *links)
{
    int64_t lowest = -(int64_t)r->lowest[page], other_lowest = -(int64_t)r->lowest[links->page];
    int64_t most = links->most_gained;
    int64_t other_most = (int64_t)links->count - links->lowest_inside;

    if (links->count == 1)
        return most + other_lowest > other_most + lowest ? most + other_lowest
                                                         : other_most + lowest;
    return (most > lowest ? most : lowest) +
           (other_most > other_lowest ? other_most : other_lowest);
}

static int compare_trades(const void *a, const void *b)
{
    const struct trade *x = a, *y = b;

    if (x->gain != y->gain)
        return x->gain < y->gain ? 1 : -1;
    return (x->other_row > y->other_row) - (x->other_row < y->other_row);
}

static bool make_offers(struct refinement *r, struct visit *visit, uint32_t page)
{
    int64_t pages = list_links(r, visit, page);
    uint32_t count = 0;

    if (pages < 0)
        return false;
    for (int64_t i = 0; i < pages; i++) {
        const struct page_links *links = &visit->pages[i];

        /* Of two pages that both are visited, one makes the offer. */
        if ((r->waiting[links->page] && links->page < page) || most_to_gain(r, page, links) <= 0)
            continue;
        visit->trades[count] = find_trade(r, visit, page, links);
        count += visit->trades[count].gain > 0;
    }
    if (count > 1)
        qsort(visit->trades, count, sizeof *visit->trades, compare_trades);
    count = count < page_rows(r, page) ? count : page_rows(r, page);
    if (count > 0)
        memcpy(r->offers + (uint64_t)page * r->capacity, visit->trades, count * sizeof *r->offers);
    r->offer_counts[page] = count;
    return true;
}

/* Of the job: what a visit to a page takes, about, where a row of a tree takes one. */
static uint64_t visit_units(uint32_t capacity)
{
    return capacity < 8 ? 1 : capacity / 4;
}

static void visit_pages(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    if (job_cancelled(r->layout->job))
        return;
    for (uint64_t page = begin; page < end; page++) {
        r->offer_counts[page] = 0;
        if (r->waiting[page] && !make_offers(r, &r->visits[worker], (uint32_t)page))
            __atomic_store_n(&r->failed, true, __ATOMIC_RELAXED);
    }
    job_advance(r->layout->job, (end - begin) * visit_units(r->capacity), NULL);
}

/* Links from a row to the rows of a page. */
static int32_t links_to(const struct refinement *r, uint32_t row, uint32_t page, uint32_t *to_other,
                        uint32_t other_row)
{
    int32_t count = 0;

    for (uint64_t i = r->link_ends[row]; i < r->link_ends[row + 1]; i++) {
        uint32_t to = link_at(r, i);

        count += page_of(r, to) == page;
        *to_other += to == other_row;
    }
    return count;
}

/* A row of the page with the fewest links inside. */
static uint32_t loosest_row(const struct refinement *r, uint32_t page)
{
    const uint32_t *members = page_members(r, page);
    uint32_t rows = page_rows(r, page), loosest = members[0];

    for (uint32_t i = 1; i < rows; i++) {
        if (r->places[members[i]].inside < r->places[loosest].inside)
            loosest = members[i];
    }
    return loosest;
}

/* Whether the trade still pays. Where one of its rows has left, the loosest of its page goes
 * instead: what it is to make room for is still true. The answer changes with the rows of the two
 * pages only. */
static bool still_pays(const struct refinement *r, uint32_t page, struct trade *trade)
{
    bool here = page_of(r, trade->row) == page;
    bool there = page_of(r, trade->other_row) == trade->other;
    uint32_t between = 0, unused = 0;
    int32_t gain;

    if (!here && !there)
        return false;
    /* Pages that no trade of this round has changed: it gains what it did. */
    if (!r->waiting[page] && !r->waiting[trade->other])
        return true;
    if (!here)
        trade->row = loosest_row(r, page);
    if (!there)
        trade->other_row = loosest_row(r, trade->other);
    gain = links_to(r, trade->row, trade->other, &between, trade->other_row) +
           links_to(r, trade->other_row, page, &unused, trade->row) -
           (int32_t)r->places[trade->row].inside - (int32_t)r->places[trade->other_row].inside -
           2 * (int32_t)between;
    return gain > 0;
}

/* Weighs the offers of r->gain as things stand before any of them is taken up, and turns the gain
 * of those that no longer pay negative: most do not, and this part is anybody's work. */
static void weigh_offers(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    (void)worker;
    for (uint64_t page = begin; page < end; page++) {
        struct trade *offers = r->offers + page * r->capacity;

        r->changed[page] = 0;
        for (uint32_t i = r->cursors[page]; i < r->offer_counts[page]; i++) {
            struct trade trade = offers[i];

            if (trade.gain != r->gain)
                break;
            if (!still_pays(r, (uint32_t)page, &trade))
                offers[i].gain = -trade.gain;
        }
    }
}

/* Takes up the page's offers of r->gain that pay: trades made. */
static uint64_t take_up(struct refinement *r, uint32_t page)
{
    const struct trade *offers = r->offers + (uint64_t)page * r->capacity;
    uint32_t i = r->cursors[page];
    uint64_t made = 0;

    for (; i < r->offer_counts[page] && abs(offers[i].gain) == r->gain; i++) {
        struct trade trade = offers[i];

        if (trade.gain < 0 && !r->changed[page] && !r->changed[trade.other])
            continue;
        if (still_pays(r, page, &trade)) {
            make_trade(r, &trade);
            made++;
        }
    }
    r->cursors[page] = i;
    return made;
}

/* Takes up the offers of a round, over all pages the most gainful first: trades made. */
static uint64_t take_up_offers(struct refinement *r)
{
    uint64_t made = 0;

    memset(r->cursors, 0, r->page_count * sizeof *r->cursors);
    r->gain = 0;
    for (uint32_t page = 0; page < r->page_count; page++) {
        const struct trade *offers = r->offers + (uint64_t)page * r->capacity;

        /* A full list may have left offers out: they get their turn. */
        r->waiting[page] = r->offer_counts[page] == page_rows(r, page);
        if (r->offer_counts[page] > 0 && offers[0].gain > r->gain)
            r->gain = offers[0].gain;
    }
    while (r->gain > 0) {
        int32_t next_gain = 0;

        pool_for(r->layout->pool, r->page_count, WEIGH_GRAIN, weigh_offers, r);
        for (uint32_t page = 0; page < r->page_count; page++) {
            const struct trade *offers = r->offers + (uint64_t)page * r->capacity;

            made += take_up(r, page);
            if (r->cursors[page] < r->offer_counts[page] &&
                offers[r->cursors[page]].gain > next_gain)
                next_gain = offers[r->cursors[page]].gain;
        }
        r->gain = next_gain;
    }
    return made;
}

/* ---- links ---- */

/* Where a row stands among the window's; NOWHERE for others. */
static uint32_t window_number(const struct window *window, uint32_t row)
{
    const uint32_t *found;

    if (row >= window->first)
        return row < window->end ? window->carried_count + (row - window->first) : NOWHERE;
    if (window->carried_count == 0)
        return NOWHERE;
    found = bsearch(&row, window->carried, window->carried_count, sizeof row, compare_rows);
    return found ? (uint32_t)(found - window->carried) : NOWHERE;
}

static uint32_t window_row(const struct window *window, uint32_t number)
{
    return number < window->carried_count ? window->carried[number]
                                          : window->first + (number - window->carried_count);
}

static uint32_t position_of(const struct refinement *r, uint32_t row)
{
    uint32_t number = window_number(r->window, row);

    return number == NOWHERE ? NOWHERE : r->positions[number];
}

/* Room for links of the position. */
static uint64_t take_room(struct refinement *r, uint32_t at, uint32_t links)
{
    return __atomic_fetch_add(&r->link_ends[at], links, __ATOMIC_RELAXED);
}

static void put_link(struct refinement *r, uint64_t link, uint32_t to)
{
    uint8_t *at = r->links + link * r->link_bytes;

    at[0] = (uint8_t)to;
    at[1] = (uint8_t)(to >> 8);
    at[2] = (uint8_t)(to >> 16);
    if (r->link_bytes > 3)
        at[3] = (uint8_t)(to >> 24);
}

/* Every pair (position, position of a listed row) of one group: counts links into link_ends
 * [position + 1], or, once there is room, writes them at link_ends[position]++. */
static void link_row(const struct list_pass *pass, uint32_t row, const uint32_t *list)
{
    struct refinement *r = pass->context;
    const struct stretch *group = r->layout->groups;
    uint32_t at = position_of(r, row);
    uint32_t listed[REFINE_PLACES];
    uint32_t links = 0;
    uint64_t room;

    if (at == NOWHERE)
        return;
    while (at >= group->end)
        group++;
    for (uint32_t i = 0; i < pass->places && list[i] < pass->count; i++) {
        uint32_t to = position_of(r, list[i]);

        if (to >= group->begin && to < group->end && to != at)
            listed[links++] = to;
    }
    if (links == 0)
        return;
    if (!r->links) {
        take_room(r, at + 1, links);
        for (uint32_t i = 0; i < links; i++)
            take_room(r, listed[i] + 1, 1);
        return;
    }
    room = take_room(r, at, links);
    for (uint32_t i = 0; i < links; i++) {
        put_link(r, room + i, listed[i]);
        put_link(r, take_room(r, listed[i], 1), at);
    }
}

static int each_link(const struct refinement *r, struct list_pass *pass, struct error *err)
{
    const struct window *window = r->window;

    for (uint32_t i = 0; i < window->carried_count; i++) {
        if (pass_over(pass, window->carried[i], window->carried[i] + 1, NULL, NULL, err) < 0)
            return -1;
    }
    return pass_over(pass, window->first, window->end, r->layout->pool, r->layout->job, err);
}

static int make_links(struct refinement *r, const struct page_neighbours *neighbours,
                      uint32_t row_count, struct error *err)
{
    struct list_pass pass = {.context = r, .row = link_row};
    const struct window *window = r->window;
    uint32_t count = r->layout->row_count;
    uint32_t numbers = window->carried_count + (window->end - window->first);
    uint64_t total = 0;
    int rc = -1;

    r->link_bytes = count <= SHORT_LINKS_ROWS ? 3 : 4;
    r->link_mask = count <= SHORT_LINKS_ROWS ? 0xffffff : UINT32_MAX;
    r->positions = malloc((size_t)numbers * sizeof *r->positions);
    r->link_ends = calloc((size_t)count + 1, sizeof *r->link_ends);
    if (!r->positions || !r->link_ends)
        goto nomem;
    if (list_pass_init(&pass, neighbours, REFINE_PLACES, row_count, err) < 0)
        goto done;
    memset(r->positions, 0xff, (size_t)numbers * sizeof *r->positions);
    for (uint32_t at = 0; at < count; at++)
        r->positions[window_number(window, r->layout->order[at])] = at;
    if (each_link(r, &pass, err) < 0)
        goto done;
    for (uint32_t at = 0; at < count; at++) {
        total += r->link_ends[at + 1];
        r->link_ends[at + 1] = (uint32_t)total;
    }
    if (total > UINT32_MAX) {
        error_set(err, ERR_INVALID, "page order: %llu links among %u rows are too many at once",
                  (unsigned long long)total, count);
        goto done;
    }
    r->links = malloc(total * r->link_bytes + 1); /* four bytes are read at the last, too */
    if (!r->links)
        goto nomem;
    if (each_link(r, &pass, err) < 0)
        goto done;
    /* Every end has moved up to the next one's place. */
    memmove(r->link_ends + 1, r->link_ends, (size_t)count * sizeof *r->link_ends);
    r->link_ends[0] = 0;
    rc = 0;
    goto done;
nomem:
    error_set(err, ERR_NOMEM, "page order: no memory for the links of %u rows", count);
done:
    free(pass.lists);
    free(r->positions);
    r->positions = NULL;
    return rc;
}

static void place_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    (void)worker;
    for (uint64_t page = begin; page < end; page++) {
        uint32_t rows = page_rows(r, (uint32_t)page);

        for (uint32_t slot = 0; slot < rows; slot++) {
            uint32_t row = (uint32_t)(page * r->capacity + slot);

            r->places[row] = (struct place){(uint32_t)page << r->slot_bits | slot, 0};
            r->members[row] = row;
        }
    }
}

static void count_inside(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    (void)worker;
    for (uint64_t page = begin; page < end; page++) {
        uint32_t first = (uint32_t)(page * r->capacity);
        uint32_t rows = page_rows(r, (uint32_t)page);

        for (uint32_t row = first; row < first + rows; row++) {
            /* Nothing has moved yet: a page is a stretch of row numbers. */
            for (uint64_t i = r->link_ends[row]; i < r->link_ends[row + 1]; i++)
                r->places[row].inside += link_at(r, i) - first < rows;
        }
    }
}

/* Only pages that wait can have changed. */
static void find_all_lowest(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    (void)worker;
    for (uint64_t page = begin; page < end; page++) {
        if (r->waiting[page])
            find_lowest(r, (uint32_t)page);
    }
}

static void sort_pages(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    (void)worker;
    for (uint64_t page = begin; page < end; page++)
        qsort(r->layout->order + page * r->capacity, page_rows(r, (uint32_t)page),
              sizeof *r->layout->order, compare_rows);
}

static int prepare_refinement(struct refinement *r, struct error *err)
{
    uint32_t count = r->layout->row_count;
    uint32_t workers = r->layout->worker_count;
    size_t pages = r->page_count;

    r->places = malloc((size_t)count * sizeof *r->places);
    r->members = malloc((size_t)count * sizeof *r->members);
    r->lowest = malloc(pages * sizeof *r->lowest);
    r->waiting = malloc(pages);
    r->changed = malloc(pages);
    r->offers = malloc((size_t)count * sizeof *r->offers);
    r->offer_counts = calloc(pages, sizeof *r->offer_counts);
    r->cursors = malloc(pages * sizeof *r->cursors);
    r->visits = calloc(workers, sizeof *r->visits);
    if (!r->places || !r->members || !r->lowest || !r->waiting || !r->changed || !r->offers ||
        !r->offer_counts || !r->cursors || !r->visits)
        goto nomem;
    for (uint32_t i = 0; i < workers; i++) {
        struct visit *visit = &r->visits[i];

        visit->numbers = calloc(pages, sizeof *visit->numbers);
        visit->gains = malloc(2 * (size_t)r->capacity * sizeof *visit->gains);
        if (!visit->numbers || !visit->gains)
            goto nomem;
    }
    pool_for(r->layout->pool, pages, VISIT_GRAIN, place_rows, r);
    pool_for(r->layout->pool, pages, VISIT_GRAIN, count_inside, r);
    memset(r->waiting, 1, pages);
    return 0;
nomem:
    return error_set(err, ERR_NOMEM, "page order: no memory to refine %u rows", count);
}

static uint32_t bits_for(uint32_t count)
{
    uint32_t bits = 0;

    while (bits < 31 && 1u << bits < count)
        bits++;
    return bits;
}

/* Refines the window's order: whole pages, the very last one of all perhaps excepted. */
static int refine(const struct layout *layout, const struct window *window,
                  const struct page_neighbours *neighbours, uint32_t rounds, uint32_t row_count,
                  struct error *err)
{
    uint32_t count = layout->row_count;
    struct refinement r = {.layout = layout, .window = window};
    uint64_t made = 1;
    int rc = -1;

    r.capacity = layout->capacity < count ? layout->capacity : count;
    r.slot_bits = bits_for(r.capacity);
    r.page_count = (uint32_t)(((uint64_t)count + r.capacity - 1) / r.capacity);
    if (make_links(&r, neighbours, row_count, err) < 0 || prepare_refinement(&r, err) < 0)
        goto done;
    for (uint32_t round = 0; round < rounds && made > 0; round++) {
        pool_for(layout->pool, r.page_count, VISIT_GRAIN, find_all_lowest, &r);
        pool_for(layout->pool, r.page_count, VISIT_GRAIN, visit_pages, &r);
        if (r.failed) {
            error_set(err, ERR_NOMEM, "page order: no memory for the links of a page");
            goto done;
        }
        if (job_advance(layout->job, 0, err) < 0)
            goto done;
        made = take_up_offers(&r);
    }
    /* From places in the order as it was to rows; the old order is kept in `inside` meanwhile. */
    for (uint32_t at = 0; at < count; at++)
        r.places[at].inside = layout->order[at];
    for (uint32_t at = 0; at < count; at++)
        layout->order[at] = r.places[r.members[at]].inside;
    pool_for(layout->pool, r.page_count, VISIT_GRAIN, sort_pages, &r);
    rc = 0;
done:
    for (uint32_t i = 0; r.visits && i < layout->worker_count; i++)
        visit_release(&r.visits[i]);
    free(r.visits);
    free(r.link_ends);
    free(r.links);
    free(r.places);
    free(r.members);
    free(r.lowest);
    free(r.waiting);
    free(r.changed);
    free(r.offers);
    free(r.offer_counts);
    free(r.cursors);
    return rc;
}

/* ---- windows ---- */

struct vector_read {
    const struct page_vectors *vectors;
    uint8_t *rows;
    uint32_t first;
    struct error *errors; /* workers */
    struct job *job;
};

static void read_vectors(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    const struct vector_read *read = context;
    const struct page_vectors *vectors = read->vectors;

    if (job_cancelled(read->job) || read->errors[worker].code != ERR_NONE)
        return;
    vectors->read(vectors->context, read->first + (uint32_t)begin, (uint32_t)(end - begin),
                  read->rows + begin * vectors->row_bytes, &read->errors[worker]);
}

/* Space for the window's vectors, in huge pages where it is worth them. */
static uint64_t buffer_bytes(uint64_t rows, uint64_t row_bytes)
{
    return align_up(rows * row_bytes, rows * row_bytes < 2 * HUGE_BYTES ? 64 : HUGE_BYTES);
}

/* The window's vectors by the rows' numbers in the window; *rows is the caller's to free. */
static int load_vectors(const struct page_vectors *vectors, const struct window *window,
                        struct pool *pool, struct job *job, uint8_t **rows, struct error *err)
{
    uint32_t workers = pool ? pool_workers(pool) : 1;
    uint64_t count = (uint64_t)window->carried_count + (window->end - window->first);
    uint64_t bytes = buffer_bytes(count, vectors->row_bytes);
    struct vector_read read = {.vectors = vectors, .first = window->first, .job = job};
    int rc = -1;

    *rows = aligned_alloc(bytes < 2 * HUGE_BYTES ? 64 : HUGE_BYTES, bytes);
    read.errors = calloc(workers, sizeof *read.errors);
    if (!*rows || !read.errors) {
        error_set(err, ERR_NOMEM, "page order: no memory for %llu vectors",
                  (unsigned long long)count);
        goto done;
    }
    if (bytes >= 2 * HUGE_BYTES)
        (void)madvise(*rows, bytes, MADV_HUGEPAGE);
    for (uint32_t i = 0; i < window->carried_count; i++) {
        if (vectors->read(vectors->context, window->carried[i], 1, *rows + i * vectors->row_bytes,
                          err) < 0)
            goto done;
    }
    read.rows = *rows + window->carried_count * vectors->row_bytes;
    pool_for(pool, window->end - window->first, READ_GRAIN, read_vectors, &read);
    for (uint32_t i = 0; i < workers; i++) {
        if (read.errors[i].code != ERR_NONE) {
            error_set(err, read.errors[i].code, "%s", read.errors[i].message);
            goto done;
        }
    }
    rc = job_advance(job, 0, err);
done:
    free(read.errors);
    return rc;
}

/* All of a layout by windows. */
struct layout_task {
    const struct page_vectors *vectors;
    const struct page_neighbours *neighbours;
    const struct page_layout_params *params;
    uint32_t window_count;
    uint32_t *order;
    uint32_t group_count;
    uint32_t ends[GROUPS_MAX];  /* of the groups, in the order */
    uint32_t begun[GROUPS_MAX]; /* of the order: what stands before is done, from here on each */
    uint32_t taken[GROUPS_MAX]; /* group's rows ascend; up to here they are those carried over */
};

static uint32_t windows_of(uint64_t count, uint64_t window_rows, bool refined)
{
    if (window_rows == 0)
        window_rows = count;
    if (refined && window_rows > WINDOW_ROWS_MAX)
        window_rows = WINDOW_ROWS_MAX;
    return (uint32_t)((count + window_rows - 1) / window_rows);
}

static bool is_refined(const struct layout_task *task)
{
    return task->neighbours && task->params->refine_rounds > 0;
}

/* Takes each group's rows of the window into layout->order. */
static void take_rows(struct layout_task *task, const struct window *window, struct layout *layout)
{
    uint32_t at = 0;

    layout->group_count = task->group_count;
    for (uint32_t i = 0; i < task->group_count; i++) {
        uint32_t begin = at;

        while (task->taken[i] < task->ends[i] && task->order[task->taken[i]] < window->end)
            task->taken[i]++;
        if (task->window_count > 1)
            memcpy(layout->order + at, task->order + task->begun[i],
                   (task->taken[i] - task->begun[i]) * sizeof *layout->order);
        at += task->taken[i] - task->begun[i];
        layout->groups[i] = (struct stretch){begin, at, NULL, NULL};
    }
    layout->row_count = at;
}

/* What is less than a page goes back to wait for the next window; the rest closes ranks. */
static void carry_over(struct layout_task *task, struct layout *layout)
{
    uint32_t at = 0;

    for (uint32_t i = 0; i < task->group_count; i++) {
        const struct stretch group = layout->groups[i];
        uint32_t rows = group.end - group.begin;
        uint32_t left = rows % layout->capacity;

        memcpy(task->order + task->taken[i] - left, layout->order + group.end - left,
               left * sizeof *task->order);
        memmove(layout->order + at, layout->order + group.begin,
                (rows - left) * sizeof *layout->order);
        layout->groups[i] = (struct stretch){at, at + (rows - left), NULL, NULL};
        at += rows - left;
    }
    layout->row_count = at;
}

/* Puts the window's whole pages behind those of the windows before. */
static void put_rows(struct layout_task *task, const struct layout *layout)
{
    for (uint32_t i = 0; i < task->group_count; i++) {
        const struct stretch *group = &layout->groups[i];

        memcpy(task->order + task->begun[i], layout->order + group->begin,
               (group->end - group->begin) * sizeof *task->order);
        task->begun[i] += group->end - group->begin;
    }
}

/* Lists the rows that wait for the window. */
static int list_carried(const struct layout_task *task, struct window *window, struct error *err)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < task->group_count; i++)
        count += task->taken[i] - task->begun[i];
    if (count == 0)
        return 0;
    window->carried = malloc((size_t)count * sizeof *window->carried);
    if (!window->carried)
        return error_set(err, ERR_NOMEM, "page order: no memory for %u rows carried over", count);
    for (uint32_t i = 0; i < task->group_count; i++) {
        uint32_t rows = task->taken[i] - task->begun[i];

        memcpy(window->carried + window->carried_count, task->order + task->begun[i],
               rows * sizeof *window->carried);
        window->carried_count += rows;
    }
    qsort(window->carried, count, sizeof *window->carried, compare_rows);
    return 0;
}

/* Lays out the window by its vectors: rows go by their numbers in the window meanwhile. */
static int lay_out_window(const struct layout_task *task, const struct window *window,
                          struct layout *layout, struct error *err)
{
    const struct page_vectors *vectors = task->vectors;
    struct vector_matrix matrix = {.data = vectors->data,
                                   .row_bytes = vectors->row_bytes,
                                   .count = vectors->count,
                                   .dim = vectors->dim,
                                   .type = vectors->type};
    uint8_t *rows = NULL;
    int rc = -1;

    if (!vectors->data) {
        if (load_vectors(vectors, window, layout->pool, layout->job, &rows, err) < 0)
            goto done;
        matrix.data = rows;
        matrix.count = layout->row_count;
        for (uint32_t at = 0; task->window_count > 1 && at < layout->row_count; at++)
            layout->order[at] = window_number(window, layout->order[at]);
    }
    if (row_space_init(&layout->space, &matrix, err) < 0 || lay_out_groups(layout, err) < 0)
        goto done;
    for (uint32_t at = 0; rows && task->window_count > 1 && at < layout->row_count; at++)
        layout->order[at] = window_row(window, layout->order[at]);
    rc = 0;
done:
    free(rows);
    return rc;
}

static int make_window(struct layout_task *task, uint32_t number, struct layout *layout,
                       struct error *err)
{
    uint64_t count = task->vectors->count;
    struct window window = {.first = (uint32_t)(count * number / task->window_count),
                            .end = (uint32_t)(count * (number + 1) / task->window_count)};
    int rc = -1;

    layout->order = task->order;
    if (list_carried(task, &window, err) < 0)
        goto done;
    if (task->window_count > 1) {
        uint64_t rows = (uint64_t)window.carried_count + (window.end - window.first);

        layout->order = malloc(rows * sizeof *layout->order);
        if (!layout->order) {
            error_set(err, ERR_NOMEM, "page order: no memory for %llu rows",
                      (unsigned long long)rows);
            goto done;
        }
    }
    take_rows(task, &window, layout);
    if (lay_out_window(task, &window, layout, err) < 0)
        goto done;
    if (number + 1 < task->window_count)
        carry_over(task, layout);
    if (is_refined(task) && layout->row_count > 0 &&
        refine(layout, &window, task->neighbours, task->params->refine_rounds, task->vectors->count,
               err) < 0)
        goto done;
    if (task->window_count > 1)
        put_rows(task, layout);
    rc = 0;
done:
    if (layout->order != task->order)
        free(layout->order);
    free(window.carried);
    return rc;
}

int page_layout_make(const struct page_vectors *vectors, const struct page_neighbours *neighbours,
                     const struct page_layout_params *params, struct pool *pool, struct job *job,
                     uint32_t *order, struct error *err)
{
    struct layout_task task = {.vectors = vectors,
                               .neighbours = neighbours,
                               .params = params,
                               .order = order,
                               .group_count = params->tier_count + 2};
    struct layout layout = {.capacity = params->capacity,
                            .seed = params->seed,
                            .pool = pool,
                            .job = job,
                            .worker_count = pool ? pool_workers(pool) : 1};
    const struct vector_matrix matrix = {.data = vectors->data,
                                         .row_bytes = vectors->row_bytes,
                                         .count = vectors->count,
                                         .dim = vectors->dim,
                                         .type = vectors->type};
    uint64_t units = vectors->count;

    if (row_space_init(&layout.space, &matrix, err) < 0 ||
        check_params(vectors->count, params, neighbours, err) < 0)
        return -1;
    if (is_refined(&task))
        units +=
            (units / params->capacity + 1) * params->refine_rounds * visit_units(params->capacity);
    job_phase(job, "page order", units);
    if (make_groups(params, vectors->count, neighbours, pool, job, order, task.ends, err) < 0)
        return -1;
    for (uint32_t i = 0; i < task.group_count; i++)
        task.begun[i] = task.taken[i] = i == 0 ? 0 : task.ends[i - 1];
    task.window_count = windows_of(vectors->count, params->window_rows, is_refined(&task));
    for (uint32_t i = 0; i < task.window_count; i++) {
        if (make_window(&task, i, &layout, err) < 0)
            return -1;
    }
    return 0;
}

int page_layout_order(const struct vector_matrix *vectors, const struct page_layout_params *params,
                      struct pool *pool, struct job *job, uint32_t *order, struct error *err)
{
    const struct neighbour_lists *lists = params->neighbours;
    struct page_vectors rows = {.count = vectors->count,
                                .dim = vectors->dim,
                                .type = vectors->type,
                                .row_bytes = vectors->row_bytes,
                                .data = vectors->data};
    struct page_neighbours neighbours = {0};

    if (lists) {
        if (lists->count != vectors->count)
            return error_set(err, ERR_INVALID, "page order: neighbour lists of %u rows for %u",
                             lists->count, vectors->count);
        neighbours = page_neighbours_of_lists(lists);
    }
    return page_layout_make(&rows, lists ? &neighbours : NULL, params, pool, job, order, err);
}

/* ---- memory ---- */

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

uint64_t page_layout_memory_bytes(uint64_t count, uint32_t window_rows, uint64_t stride, uint32_t k,
                                  uint32_t capacity, uint32_t workers)
{
    uint64_t windows = windows_of(count, window_rows, k > 0);
    uint64_t carried = windows > 1 ? GROUPS_MAX * (uint64_t)(capacity - 1) : 0;
    uint64_t rows = (count + windows - 1) / windows + carried;
    uint64_t pages = rows / capacity + 1;
    uint64_t places = k < REFINE_PLACES ? k : REFINE_PLACES;
    uint64_t link_bytes = rows <= SHORT_LINKS_ROWS ? 3 : 4;
    uint64_t window = (windows > 1 ? rows * sizeof(uint32_t) : 0) + carried * sizeof(uint32_t);
    uint64_t lists = k > 0 ? list_memory_bytes(count, k) : 0;
    uint64_t links = rows * (sizeof(uint32_t) + 2 * places * link_bytes);
    uint64_t groups, tree, making, refining;

    groups = count + (k > 0 ? count * sizeof(uint32_t) + 2 * 65536 * sizeof(uint32_t) + lists : 0);
    /* A space row has no more dimensions than bytes. */
    tree = buffer_bytes(rows, stride) + (stride > 0 ? HUGE_BYTES : 0) + rows * sizeof(uint64_t) +
           TOP_NODES * (sizeof(struct stretch) + 2 * stride * sizeof(float)) +
           workers * (SAMPLE_ROWS * sizeof(uint64_t) + sizeof(struct error) +
                      (2ull * tree_levels((uint32_t)rows, capacity) + 6) * stride * sizeof(float));
    making = links + rows * sizeof(uint32_t) + lists;
    refining =
        links + rows * (sizeof(struct place) + sizeof(uint32_t) + sizeof(struct trade)) +
        pages * (3 * sizeof(uint32_t) + 2) +
        workers * (pages * sizeof(uint32_t) + 2ull * capacity * sizeof(int32_t) +
                   /* Lists of a page's links: rows that many list have more. */
                   4 * places * capacity *
                       (3 * sizeof(uint32_t) + sizeof(struct page_links) + sizeof(struct trade)));
    return larger(groups, window + larger(tree, k > 0 ? larger(making, refining) : 0));
}

uint32_t page_layout_window_rows(uint32_t count, uint64_t memory_bytes, uint64_t stride, uint32_t k,
                                 uint32_t capacity, uint32_t workers)
{
    /* Windows; equal ones may turn out smaller than the smallest. */
    uint32_t fewest = 2,
             most = (uint32_t)(((uint64_t)count + WINDOW_ROWS_MIN - 1) / WINDOW_ROWS_MIN);

    if (page_layout_memory_bytes(count, count, stride, k, capacity, workers) <= memory_bytes)
        return count;
    while (fewest < most) {
        uint32_t windows = fewest + (most - fewest) / 2;
        uint32_t rows = (uint32_t)(((uint64_t)count + windows - 1) / windows);

        if (page_layout_memory_bytes(count, rows, stride, k, capacity, workers) <= memory_bytes)
            most = windows;
        else
            fewest = windows + 1;
    }
    if (most >= fewest) {
        uint32_t rows = (uint32_t)(((uint64_t)count + most - 1) / most);

        if (page_layout_memory_bytes(count, rows, stride, k, capacity, workers) <= memory_bytes)
            return rows;
    }
    return 0;
}
