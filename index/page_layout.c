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
 * before it may have changed what it gains. So the number of pairs that share a page only ever
 * grows, pages stay full and stay where they are. Compared with Starling's rounds, which assign
 * every row anew, it ends with more such pairs, and nothing is left over. Pages that took part in
 * no trade of a round are not looked at in the next: no other change can make a trade between two
 * such pages pay. */
#include "index/page_layout.h"

#include <stdlib.h>
#include <string.h>

#include "index/vamana_search.h"
#include "storage/base/random.h"

#define SAMPLE_ROWS 1024u
#define MEANS_ROUNDS 6u
#define FARTHEST_TRIES 16u
#define TOP_NODES 128u /* stretches handed to the workers as whole subtrees */
#define TOP_ROWS 8192u /* smaller stretches are not worth the whole pool */
#define PROJECT_GRAIN 1024u
#define PREFETCH_AHEAD 8u
#define GROUPS_MAX (PAGE_LAYOUT_TIERS_MAX + 2) /* tiers, the rest, the rows apart */
#define HOT_PLACES 12u    /* of the neighbour lists, that say how hot a row is */
#define REFINE_PLACES 24u /* of the neighbour lists, that refinement counts */
#define VISIT_GRAIN 64u   /* pages */

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
    struct stretch groups[GROUPS_MAX];
    uint32_t group_count;
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
                count + 2 + waiting > TOP_NODES || job_cancelled(layout->job)) {
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

/* ---- groups ---- */

static int check_params(const struct row_space *space, const struct page_layout_params *params,
                        struct error *err)
{
    uint32_t count = space->count;
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
    if (!params->neighbours)
        return params->tier_count == 0
                   ? 0
                   : error_set(err, ERR_INVALID, "page order: hot tiers need neighbour lists");
    if (params->neighbours->count != count || params->neighbours->k == 0)
        return error_set(err, ERR_INVALID, "page order: neighbour lists of %u rows, k %u, for %u",
                         params->neighbours->count, params->neighbours->k, count);
    return 0;
}

/* Which group every row stands in: numbers of layout->groups into group_of[count]. */
static int assign_groups(struct layout *layout, const struct page_layout_params *params,
                         uint8_t *group_of, struct error *err)
{
    const struct neighbour_lists *lists = params->neighbours;
    uint32_t count = layout->space.count;
    uint32_t taking_part = count - params->apart_count;
    uint8_t rest = (uint8_t)params->tier_count;
    uint8_t apart = (uint8_t)(rest + 1);
    uint32_t *degrees;
    uint32_t ranked = 0;

    memset(group_of, rest, count);
    for (uint32_t i = 0; i < params->apart_count; i++) {
        uint32_t row = params->apart[i];

        if (row >= count || group_of[row] == apart)
            return error_set(err, ERR_INVALID, "page order: row %u apart is %s", row,
                             row >= count ? "not there" : "named twice");
        group_of[row] = apart;
    }
    if (params->tier_count == 0)
        return 0;
    degrees = calloc(count, sizeof *degrees);
    if (!degrees)
        return error_set(err, ERR_NOMEM, "page order: no memory for %u counts", count);
    for (uint32_t row = 0; row < count; row++) {
        const uint32_t *list = lists->rows + (uint64_t)row * lists->k;

        if (group_of[row] == apart)
            continue;
        for (uint32_t i = 0; i < lists->k && i < HOT_PLACES && list[i] < count; i++)
            degrees[list[i]]++;
    }
    for (uint32_t row = 0; row < count; row++) {
        if (group_of[row] != apart)
            layout->keys[ranked++] = (uint64_t)(UINT32_MAX - degrees[row]) << 32 | row;
    }
    free(degrees);
    for (uint32_t i = 0; i < params->tier_count; i++) {
        uint32_t begin = i == 0 ? 0 : params->tier_ends[i - 1];
        uint32_t end = params->tier_ends[i];

        select_keys(layout->keys + begin, taking_part - begin, end - begin);
        for (uint32_t rank = begin; rank < end; rank++)
            group_of[(uint32_t)layout->keys[rank]] = (uint8_t)i;
    }
    return 0;
}

/* Fills the groups' stretches, and the order with each group's rows, ascending. */
static int make_groups(struct layout *layout, const struct page_layout_params *params,
                       struct error *err)
{
    uint32_t count = layout->space.count;
    uint32_t taking_part = count - params->apart_count;
    uint32_t next[GROUPS_MAX];
    uint8_t *group_of = malloc(count);
    uint32_t begin = 0;
    int rc = -1;

    if (!group_of) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u rows", count);
        goto done;
    }
    if (assign_groups(layout, params, group_of, err) < 0)
        goto done;
    layout->group_count = params->tier_count + 2;
    for (uint32_t i = 0; i < layout->group_count; i++) {
        uint32_t end = i < params->tier_count    ? params->tier_ends[i]
                       : i == params->tier_count ? taking_part
                                                 : count;

        layout->groups[i] = (struct stretch){begin, end, NULL, NULL};
        next[i] = begin;
        begin = end;
    }
    for (uint32_t row = 0; row < count; row++)
        layout->order[next[group_of[row]]++] = row;
    rc = 0;
done:
    free(group_of);
    return rc;
}

/* ---- refinement ---- */

/* Rows are known by their position in the order as it was before: near rows have near numbers.
 * Links are pairs of rows of one group, one of which lists the other, seen from both ends; a pair
 * that lists each other has two. */
struct refinement {
    const struct layout *layout;
    uint32_t capacity;
    uint64_t *link_ends; /* count + 1: links of row i stand from link_ends[i] to the next */
    uint32_t *links;
    struct place *places;   /* count */
    uint32_t *members;      /* count: members[page * capacity + slot] */
    uint32_t *lowest;       /* pages: the smallest `inside` of a page's rows */
    uint8_t *waiting;       /* pages: to be visited */
    struct trade *offers;   /* count: up to capacity a page, the most gainful first */
    uint32_t *offer_counts; /* pages */
    struct visit *visits;   /* workers */
    uint32_t page_count;
    bool failed; /* memory is out; set by any worker, read after the loop */
};

struct trade {
    int32_t gain; /* pairs of neighbours that share a page only after it */
    uint32_t row;
    uint32_t other_row;
    uint32_t other; /* the page of other_row when the trade was found */
};

/* Where a row stands. */
struct place {
    uint32_t page;
    uint32_t slot;
    uint32_t inside; /* links to rows on the same page */
};

/* Links from the visited page to another. */
struct page_links {
    uint32_t count; /* 0 between visits: then nothing else here is valid */
    uint32_t first;
    uint32_t slot;          /* of the visited page, whose links were counted last */
    uint32_t slot_links;    /* and how many they are */
    int32_t most_gained;    /* of any row of the visited page by going there */
    uint32_t lowest_inside; /* of the rows linked to there */
};

/* What one worker needs to visit a page. */
struct visit {
    struct page_links *to_page; /* pages */
    uint32_t *pages;            /* pages with links */
    uint32_t *from;             /* per link: its slot on the visited page, */
    uint32_t *to;               /* the row at the other end */
    uint32_t *next;             /* and the next link to the same page */
    struct trade *trades;       /* the best with each of the pages */
    uint64_t room;              /* of the last five */
    int32_t *gains;             /* 2 x capacity */
};

static uint32_t page_rows(const struct refinement *r, uint32_t page)
{
    uint64_t begin = (uint64_t)page * r->capacity;
    uint64_t left = r->layout->space.count - begin;

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
    free(visit->to_page);
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
                               uint32_t other)
{
    const uint32_t *members = page_members(r, page), *others = page_members(r, other);
    uint32_t rows = page_rows(r, page), other_rows = page_rows(r, other);
    int32_t *gains = visit->gains, *other_gains = visit->gains + r->capacity;
    uint32_t first = visit->to_page[other].first;
    struct trade best = {0};
    int32_t most = INT32_MIN / 2;

    for (uint32_t i = 0; i < rows; i++)
        gains[i] = -(int32_t)r->places[members[i]].inside;
    for (uint32_t i = 0; i < other_rows; i++)
        other_gains[i] = -(int32_t)r->places[others[i]].inside;
    for (uint32_t link = first; link != UINT32_MAX; link = visit->next[link]) {
        gains[visit->from[link]]++;
        other_gains[r->places[visit->to[link]].slot]++;
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
static void move_row(struct refinement *r, uint32_t row, uint32_t page, uint32_t other)
{
    uint32_t inside = 0;

    for (uint64_t i = r->link_ends[row]; i < r->link_ends[row + 1]; i++) {
        struct place *place = &r->places[r->links[i]];

        if (place->page == page) {
            place->inside--;
        } else if (place->page == other) {
            place->inside++;
            inside++;
        }
    }
    r->places[row].inside = inside;
    r->places[row].page = other;
}

static void make_trade(struct refinement *r, const struct trade *trade)
{
    struct place place = r->places[trade->row], other = r->places[trade->other_row];

    move_row(r, trade->row, place.page, other.page);
    move_row(r, trade->other_row, other.page, place.page);
    r->members[(uint64_t)place.page * r->capacity + place.slot] = trade->other_row;
    r->members[(uint64_t)other.page * r->capacity + other.slot] = trade->row;
    r->places[trade->other_row].slot = place.slot;
    r->places[trade->row].slot = other.slot;
    find_lowest(r, place.page);
    find_lowest(r, other.page);
    r->waiting[place.page] = 1;
    r->waiting[other.page] = 1;
}

static void list_link(struct visit *visit, uint32_t link, uint32_t slot, uint32_t inside,
                      uint32_t to, const struct place *place)
{
    struct page_links *links = &visit->to_page[place->page];
    int32_t gained;

    if (links->slot != slot) {
        links->slot = slot;
        links->slot_links = 0;
    }
    gained = (int32_t)++links->slot_links - (int32_t)inside;
    if (gained > links->most_gained)
        links->most_gained = gained;
    if (place->inside < links->lowest_inside)
        links->lowest_inside = place->inside;
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
        uint32_t row = members[slot];
        uint64_t end = r->link_ends[row + 1];

        for (uint64_t i = r->link_ends[row]; i < end; i++) {
            const struct place *place = &r->places[r->links[i]];

            if (i + PREFETCH_AHEAD < end)
                __builtin_prefetch(&r->places[r->links[i + PREFETCH_AHEAD]]);
            if (place->page == page)
                continue;
            if (visit->to_page[place->page].count == 0) {
                visit->pages[pages++] = place->page;
                visit->to_page[place->page] = (struct page_links){.first = UINT32_MAX,
                                                                  .slot = UINT32_MAX,
                                                                  .most_gained = INT32_MIN,
                                                                  .lowest_inside = UINT32_MAX};
            }
            list_link(visit, links++, slot, r->places[row].inside, r->links[i], place);
        }
    }
    return pages;
}

/* No trade of the two pages gains more. Most pages that are linked are so by one link: then it
 * either brings its row of this page in, or the other one out, not both. */
static int64_t most_to_gain(const struct refinement *r, const struct visit *visit, uint32_t page,
                            uint32_t other)
{
    const struct page_links *links = &visit->to_page[other];
    int64_t lowest = -(int64_t)r->lowest[page], other_lowest = -(int64_t)r->lowest[other];
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
        uint32_t other = visit->pages[i];
        /* Of two pages that both are visited, one makes the offer. */
        bool wanted =
            !(r->waiting[other] && other < page) && most_to_gain(r, visit, page, other) > 0;

        visit->to_page[other].count = 0;
        if (!wanted)
            continue;
        visit->trades[count] = find_trade(r, visit, page, other);
        count += visit->trades[count].gain > 0;
    }
    qsort(visit->trades, count, sizeof *visit->trades, compare_trades);
    count = count < page_rows(r, page) ? count : page_rows(r, page);
    memcpy(r->offers + (uint64_t)page * r->capacity, visit->trades, count * sizeof *r->offers);
    r->offer_counts[page] = count;
    return true;
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
    job_advance(r->layout->job, end - begin, NULL);
}

/* Links from a row to the rows of a page. */
static int32_t links_to(const struct refinement *r, uint32_t row, uint32_t page, uint32_t *to_other,
                        uint32_t other_row)
{
    int32_t count = 0;

    for (uint64_t i = r->link_ends[row]; i < r->link_ends[row + 1]; i++) {
        count += r->places[r->links[i]].page == page;
        *to_other += r->links[i] == other_row;
    }
    return count;
}

/* A row of the page with the fewest links inside. */
static uint32_t loosest_row(const struct refinement *r, uint32_t page)
{
    const uint32_t *members = page_members(r, page);
    uint32_t at = 0;

    while (r->places[members[at]].inside != r->lowest[page])
        at++;
    return members[at];
}

/* Makes the trade if it still pays. Where one of the rows has left, the loosest of its page goes
 * instead: what it is to make room for is still true. */
static bool take_up(struct refinement *r, uint32_t page, struct trade trade)
{
    bool here = r->places[trade.row].page == page;
    bool there = r->places[trade.other_row].page == trade.other;
    uint32_t between = 0, unused = 0;
    int32_t gain;

    if (!here && !there)
        return false;
    if (!here)
        trade.row = loosest_row(r, page);
    if (!there)
        trade.other_row = loosest_row(r, trade.other);
    gain = links_to(r, trade.row, trade.other, &between, trade.other_row) +
           links_to(r, trade.other_row, page, &unused, trade.row) -
           (int32_t)r->places[trade.row].inside - (int32_t)r->places[trade.other_row].inside -
           2 * (int32_t)between;
    if (gain <= 0)
        return false;
    make_trade(r, &trade);
    return true;
}

/* Takes up the offers of a round, over all pages the most gainful first: trades made. */
static uint64_t take_up_offers(struct refinement *r, uint32_t *cursors)
{
    uint64_t made = 0;
    int32_t gain = 0;

    memset(cursors, 0, r->page_count * sizeof *cursors);
    for (uint32_t page = 0; page < r->page_count; page++) {
        const struct trade *offers = r->offers + (uint64_t)page * r->capacity;

        /* A full list may have left offers out: they get their turn. */
        r->waiting[page] = r->offer_counts[page] == page_rows(r, page);
        if (r->offer_counts[page] > 0 && offers[0].gain > gain)
            gain = offers[0].gain;
    }
    while (gain > 0) {
        int32_t next_gain = 0;

        for (uint32_t page = 0; page < r->page_count; page++) {
            const struct trade *offers = r->offers + (uint64_t)page * r->capacity;
            uint32_t count = r->offer_counts[page];

            for (; cursors[page] < count && offers[cursors[page]].gain == gain; cursors[page]++)
                made += take_up(r, page, offers[cursors[page]]);
            if (cursors[page] < count && offers[cursors[page]].gain > next_gain)
                next_gain = offers[cursors[page]].gain;
        }
        gain = next_gain;
    }
    return made;
}

/* Calls for every pair (position, position of a listed row) of one group: counts links into
 * link_ends[position + 1], or writes them at link_ends[position]++. */
static void each_link(struct refinement *r, const struct neighbour_lists *lists,
                      const uint32_t *positions, bool write)
{
    uint32_t places = lists->k < REFINE_PLACES ? lists->k : REFINE_PLACES;

    for (uint32_t g = 0; g < r->layout->group_count; g++) {
        const struct stretch *group = &r->layout->groups[g];

        for (uint32_t at = group->begin; at < group->end; at++) {
            const uint32_t *list = lists->rows + (uint64_t)r->layout->order[at] * lists->k;

            for (uint32_t i = 0; i < places && list[i] < r->layout->space.count; i++) {
                uint32_t to = positions[list[i]];

                if (to < group->begin || to >= group->end || to == at)
                    continue;
                if (write) {
                    r->links[r->link_ends[at]++] = to;
                    r->links[r->link_ends[to]++] = at;
                } else {
                    r->link_ends[at + 1]++;
                    r->link_ends[to + 1]++;
                }
            }
        }
    }
}

static int make_links(struct refinement *r, const struct neighbour_lists *lists, struct error *err)
{
    uint32_t count = r->layout->space.count;
    uint32_t *positions = malloc((size_t)count * sizeof *positions);
    int rc = -1;

    if (!positions)
        goto nomem;
    for (uint32_t at = 0; at < count; at++)
        positions[r->layout->order[at]] = at;
    each_link(r, lists, positions, false);
    for (uint32_t at = 0; at < count; at++)
        r->link_ends[at + 1] += r->link_ends[at];
    r->links = malloc((r->link_ends[count] + 1) * sizeof *r->links);
    if (!r->links)
        goto nomem;
    each_link(r, lists, positions, true);
    /* Every end has moved up to the next one's place. */
    memmove(r->link_ends + 1, r->link_ends, (size_t)count * sizeof *r->link_ends);
    r->link_ends[0] = 0;
    rc = 0;
    goto done;
nomem:
    error_set(err, ERR_NOMEM, "page order: no memory for the links of %u rows", count);
done:
    free(positions);
    return rc;
}

static void sort_pages(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct refinement *r = context;

    (void)worker;
    for (uint64_t page = begin; page < end; page++)
        qsort(r->layout->order + page * r->capacity, page_rows(r, (uint32_t)page),
              sizeof *r->layout->order, compare_rows);
}

static int prepare_refinement(struct refinement *r, const struct neighbour_lists *lists,
                              uint32_t workers, struct error *err)
{
    uint32_t count = r->layout->space.count;
    size_t pages = r->page_count;

    r->link_ends = calloc((size_t)count + 1, sizeof *r->link_ends);
    r->places = malloc((size_t)count * sizeof *r->places);
    r->members = malloc((size_t)count * sizeof *r->members);
    r->lowest = malloc(pages * sizeof *r->lowest);
    r->waiting = malloc(pages);
    r->offers = malloc((size_t)count * sizeof *r->offers);
    r->offer_counts = calloc(pages, sizeof *r->offer_counts);
    r->visits = calloc(workers, sizeof *r->visits);
    if (!r->link_ends || !r->places || !r->members || !r->lowest || !r->waiting || !r->offers ||
        !r->offer_counts || !r->visits)
        goto nomem;
    for (uint32_t i = 0; i < workers; i++) {
        struct visit *visit = &r->visits[i];

        visit->to_page = calloc(pages, sizeof *visit->to_page);
        visit->gains = malloc(2 * (size_t)r->capacity * sizeof *visit->gains);
        if (!visit->to_page || !visit->gains)
            goto nomem;
    }
    if (make_links(r, lists, err) < 0)
        return -1;
    for (uint32_t at = 0; at < count; at++) {
        r->places[at] = (struct place){at / r->capacity, at % r->capacity, 0};
        r->members[at] = at;
    }
    for (uint32_t at = 0; at < count; at++) {
        for (uint64_t i = r->link_ends[at]; i < r->link_ends[at + 1]; i++)
            r->places[at].inside += r->places[r->links[i]].page == r->places[at].page;
    }
    for (uint32_t page = 0; page < pages; page++)
        find_lowest(r, page);
    memset(r->waiting, 1, pages);
    return 0;
nomem:
    return error_set(err, ERR_NOMEM, "page order: no memory to refine %u rows", count);
}

static int refine(const struct layout *layout, const struct page_layout_params *params,
                  uint32_t workers, struct error *err)
{
    uint32_t count = layout->space.count;
    struct refinement r = {.layout = layout};
    uint32_t *cursors = NULL;
    uint64_t made = 1;
    int rc = -1;

    r.capacity = params->capacity < count ? params->capacity : count;
    r.page_count = (uint32_t)(((uint64_t)count + r.capacity - 1) / r.capacity);
    cursors = malloc(r.page_count * sizeof *cursors);
    if (!cursors) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u pages", r.page_count);
        goto done;
    }
    if (prepare_refinement(&r, params->neighbours, workers, err) < 0)
        goto done;
    job_phase(layout->job, "page refinement", (uint64_t)params->refine_rounds * r.page_count);
    for (uint32_t round = 0; round < params->refine_rounds && made > 0; round++) {
        pool_for(layout->pool, r.page_count, VISIT_GRAIN, visit_pages, &r);
        if (r.failed) {
            error_set(err, ERR_NOMEM, "page order: no memory for the links of a page");
            goto done;
        }
        if (job_advance(layout->job, 0, err) < 0)
            goto done;
        made = take_up_offers(&r, cursors);
    }
    /* From places in the order as it was to rows; the old order is kept in `slot` meanwhile. */
    for (uint32_t at = 0; at < count; at++)
        r.places[at].slot = layout->order[at];
    for (uint32_t at = 0; at < count; at++)
        layout->order[at] = r.places[r.members[at]].slot;
    pool_for(layout->pool, r.page_count, VISIT_GRAIN, sort_pages, &r);
    rc = 0;
done:
    for (uint32_t i = 0; r.visits && i < workers; i++)
        visit_release(&r.visits[i]);
    free(r.visits);
    free(r.link_ends);
    free(r.links);
    free(r.places);
    free(r.members);
    free(r.lowest);
    free(r.waiting);
    free(r.offers);
    free(r.offer_counts);
    free(cursors);
    return rc;
}

int page_layout_order(const struct vector_matrix *vectors, const struct page_layout_params *params,
                      struct pool *pool, struct job *job, uint32_t *order, struct error *err)
{
    struct layout layout = {.capacity = params->capacity,
                            .seed = params->seed,
                            .pool = pool,
                            .job = job,
                            .order = order};
    uint32_t workers = pool ? pool_workers(pool) : 1;
    float *top_centres = NULL;
    int rc = -1;

    if (row_space_init(&layout.space, vectors, err) < 0 ||
        check_params(&layout.space, params, err) < 0)
        goto done;
    if (prepare(&layout, workers, err) < 0 || make_groups(&layout, params, err) < 0)
        goto done;
    top_centres = malloc((size_t)TOP_NODES * 2 * vectors->dim * sizeof *top_centres);
    if (!top_centres) {
        error_set(err, ERR_NOMEM, "page order: no memory for %u centres", TOP_NODES * 2);
        goto done;
    }
    job_phase(job, "page order", vectors->count);
    for (uint32_t i = 0; i < layout.group_count; i++) {
        if (layout.groups[i].begin < layout.groups[i].end)
            layout.subtrees[layout.subtree_count++] = layout.groups[i];
    }
    lay_out_top(&layout, top_centres);
    pool_for(pool, layout.subtree_count, 1, lay_out_subtrees, &layout);
    rc = job_advance(job, 0, err);
    if (rc < 0 || !params->neighbours || params->refine_rounds == 0)
        goto done;
    free(layout.keys); /* the links take more room than these: not both at once */
    layout.keys = NULL;
    rc = refine(&layout, params, workers, err);
done:
    free(top_centres);
    release(&layout, workers);
    return rc;
}
