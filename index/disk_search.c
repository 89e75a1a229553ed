/* How the walk works.
 *
 * Seeds: the nearest cells are ranked by their centroids and their codes scanned in one pass; the
 * best of them fill the candidate list. (The graph's entry point is there too, for data where the
 * cells mislead.)
 *
 * The list holds up to search_list nodes, nearest first. A candidate enters with an estimate from
 * its code; when its page is read, the exact distance takes the estimate's place, and so do those
 * of every other node on the page. Then all loaded nodes that rank in the list's nearer part are
 * expanded: their neighbours are estimated in one batch and enter the list. Pages in memory cost no
 * read, so all that rank are worked off first. Only when nothing loaded is left to expand does the
 * query ask for more pages, those of its best unread candidates, up to beam_width in flight. So a
 * page's buffer is free again as soon as the page has been worked off.
 *
 * Before each read the rule is asked (walk_rule.h). Candidates whose page is in flight do not
 * count: the question is what one more read would bring. Should an arrival bring new candidates,
 * reading goes on.
 *
 * Pages are worked off in the order they were asked for, whatever order they arrive in: the answer
 * is a function of the index and the query alone.
 *
 * What was seen is kept three ways. The sets of pages and of scanned cells are exact: a neighbour
 * on a page that was read or is in flight is scored there, one in a scanned cell was estimated
 * there. The filter of estimated positions forgets; a position that is estimated again gets the
 * same number and is recognised in the list. */
#include "index/disk_search.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "index/candidate_list.h"
#include "index/candidates.h"
#include "storage/base/bytes.h"
#include "storage/file.h"

#define BATCH_MAX 2048u        /* neighbours estimated at once */
#define SCAN_RUN 512u          /* codes scanned at once */
#define VISITED_EXPECTED 1024u /* estimated neighbours of a usual walk */
#define RESIDENT_BATCH 8u      /* pages in memory worked off at once */
#define BURST_MIN 16u          /* buffers for exact_scores */
#define LINE_BYTES 64u
/* Nodes beyond this part of the list are not expanded: they rank too low to lead anywhere new. */
#define EXPAND_PART 2u

struct page_slot {
    struct reader_read read;
    uint64_t block; /* first block read */
    uint32_t blocks;
    uint32_t depth; /* dependent steps up to and including this read */
    uint32_t hit;   /* of exact_scores */
    bool arrived;
};

struct disk_search {
    struct disk_search_limits limits;
    const struct disk_index *index;
    struct search_params params;
    struct store_query query;
    struct code_table table;
    const struct code_scan_kernels *scan;
    float *scratch;
    void *cell_scratch;
    uint32_t *cells; /* ascending */
    uint32_t cell_count;

    struct candidate_list list;
    struct search_hit *hits; /* ascending by (distance, key) */
    uint32_t hit_count;
    uint32_t hidden; /* UINT32_MAX: none */

    struct mark_set pages;
    struct mark_set scanned;
    struct visited visited;
    uint64_t *seeds; /* sum << 32 | position, of scanned codes */
    uint32_t seed_max;

    struct page_slot *slots;
    uint8_t *buffers;
    uint32_t slot_count;
    uint32_t *flying; /* slots in the order asked for, a ring */
    uint32_t flying_first;
    uint32_t flying_count;
    uint32_t *free_slots;
    uint32_t free_count;
    struct reader_read **wanted;
    uint32_t wanted_count;
    uint32_t outstanding; /* handed out by wanted(), not back yet */
    uint32_t beam_width;
    uint32_t depth;
    uint32_t expand_limit;

    uint32_t pages_read; /* worked off */
    uint32_t quiet;      /* the last of them that brought no new hit */
    bool hits_changed;
    bool scoring; /* the walk is over, originals are being read */
    uint32_t scored;

    uint32_t neighbours[PAGE_DEGREE_MAX];
    uint32_t batch[BATCH_MAX];
    uint32_t batch_count;
    uint16_t sums[BATCH_MAX];
    uint32_t below[BATCH_MAX];
    float estimate_scale; /* estimate = (offset + step * sum) * scale */
    float spread_factor;

    struct search_stats stats;
    struct error error;
    bool failed;
};

static uint32_t slots_of(const struct disk_search_limits *limits)
{
    return limits->beam_width < BURST_MIN ? BURST_MIN : limits->beam_width;
}

static uint32_t list_capacity(const struct disk_search_limits *limits)
{
    return limits->search_list_max > limits->k_max ? limits->search_list_max : limits->k_max;
}

/* Pages a walk may see: what it reads and works off is bounded by a few lists' worth. */
static uint32_t pages_expected(uint32_t search_list)
{
    return search_list * 4 + 1024;
}

void disk_search_limits_raise(struct disk_search_limits *limits, const struct disk_index *index)
{
    uint64_t entries = quantiser_table_entries(index->quantiser);
    uint64_t floats = quantiser_scratch_floats(index->quantiser);
    uint64_t cells = cells_scratch_bytes(index->cells, limits->cells_max);
    uint32_t bytes = index->format.page_bytes;

    if (index->originals) {
        uint64_t payload = index->originals->block_bytes - BLOCK_CRC_BYTES;
        uint64_t blocks = (element_bytes(index->element, index->dim) + payload - 2) / payload + 1;

        if (blocks * index->originals->block_bytes > bytes)
            bytes = (uint32_t)(blocks * index->originals->block_bytes);
    }
    if (index->dim > limits->dim_max)
        limits->dim_max = index->dim;
    if (bytes > limits->buffer_bytes_max)
        limits->buffer_bytes_max = bytes;
    if (entries > limits->table_entries_max)
        limits->table_entries_max = entries;
    if (floats > limits->scratch_floats_max)
        limits->scratch_floats_max = floats;
    if (cells > limits->cell_scratch_bytes_max)
        limits->cell_scratch_bytes_max = cells;
}

/* Seeds are cut back to the list's length whenever twice as many, and a run, have gathered. */
static uint32_t seeds_max(const struct disk_search_limits *limits)
{
    return 2 * list_capacity(limits) + SCAN_RUN;
}

uint64_t disk_search_memory_bytes(const struct disk_search_limits *limits)
{
    return sizeof(struct disk_search) + limits->dim_max * 5ull + limits->table_entries_max * 2 +
           limits->scratch_floats_max * 4 + limits->cell_scratch_bytes_max +
           limits->cells_max * 4ull +
           candidate_list_memory_bytes(list_capacity(limits), BATCH_MAX) +
           limits->k_max * sizeof(struct search_hit) +
           mark_set_memory_bytes(pages_expected(list_capacity(limits))) +
           mark_set_memory_bytes(limits->cells_max) + visited_memory_bytes(VISITED_EXPECTED) +
           seeds_max(limits) * 8ull +
           slots_of(limits) * (sizeof(struct page_slot) + 16 + (uint64_t)limits->buffer_bytes_max);
}

static void *aligned(uint64_t bytes)
{
    return aligned_alloc(LINE_BYTES, (bytes + LINE_BYTES) & ~(uint64_t)(LINE_BYTES - 1));
}

int disk_search_new(const struct disk_search_limits *limits, struct disk_search **out,
                    struct error *err)
{
    struct disk_search *s;

    if (limits->beam_width < 1 || limits->beam_width > DISK_SEARCH_BEAM_MAX ||
        limits->search_list_max < 1 || limits->search_list_max > SEARCH_LIST_MAX ||
        limits->k_max < 1 || limits->k_max > SEARCH_LIST_MAX ||
        limits->cells_max > DISK_SEARCH_CELLS_MAX)
        return error_set(err, ERR_INVALID,
                         "a search takes a beam of 1..%u, a list and k of 1..%u, up to %u cells; "
                         "got %u, %u, %u, %u",
                         DISK_SEARCH_BEAM_MAX, SEARCH_LIST_MAX, DISK_SEARCH_CELLS_MAX,
                         limits->beam_width, limits->search_list_max, limits->k_max,
                         limits->cells_max);
    s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_NOMEM, "no memory for a search");
    s->limits = *limits;
    s->slot_count = slots_of(limits);
    s->seed_max = seeds_max(limits);
    s->query.vector = malloc(limits->dim_max * 4ull + 4);
    s->query.integers = malloc(limits->dim_max + 1ull);
    s->table.entries = aligned(limits->table_entries_max * 2);
    s->scratch = aligned(limits->scratch_floats_max * 4);
    s->cell_scratch = aligned(limits->cell_scratch_bytes_max);
    s->cells = malloc((limits->cells_max + 1ull) * sizeof *s->cells);
    s->seeds = malloc(s->seed_max * sizeof *s->seeds);
    s->hits = malloc(limits->k_max * sizeof *s->hits);
    s->slots = calloc(s->slot_count, sizeof *s->slots);
    s->flying = malloc(s->slot_count * sizeof *s->flying);
    s->free_slots = malloc(s->slot_count * sizeof *s->free_slots);
    s->wanted = malloc(s->slot_count * sizeof *s->wanted);
    s->buffers = file_buffer_alloc((uint64_t)s->slot_count * limits->buffer_bytes_max);
    if (!s->query.vector || !s->query.integers || !s->table.entries || !s->scratch ||
        !s->cell_scratch || !s->cells || !s->seeds || !s->hits || !s->slots || !s->flying ||
        !s->free_slots || !s->wanted || !s->buffers ||
        candidate_list_init(&s->list, list_capacity(limits), BATCH_MAX, err) < 0 ||
        mark_set_init(&s->pages, pages_expected(list_capacity(limits)), err) < 0 ||
        mark_set_init(&s->scanned, limits->cells_max, err) < 0 ||
        visited_init(&s->visited, VISITED_EXPECTED, err) < 0) {
        disk_search_free(s);
        return error_set(err, ERR_NOMEM, "no memory for a search's scratch");
    }
    s->scan = code_scan_kernels_best();
    *out = s;
    return 0;
}

void disk_search_free(struct disk_search *s)
{
    if (!s)
        return;
    free(s->query.vector);
    free(s->query.integers);
    free(s->table.entries);
    free(s->scratch);
    free(s->cell_scratch);
    free(s->cells);
    free(s->seeds);
    free(s->hits);
    free(s->slots);
    free(s->flying);
    free(s->free_slots);
    free(s->wanted);
    free(s->buffers);
    candidate_list_release(&s->list);
    mark_set_release(&s->pages);
    mark_set_release(&s->scanned);
    visited_release(&s->visited);
    free(s);
}

float search_score(enum metric metric, float distance)
{
    switch (metric) {
    case METRIC_IP:
        return -distance;
    case METRIC_COSINE:
        return 1 - distance;
    case METRIC_L2:
        break;
    }
    return distance;
}

const char *search_stop_name(enum search_stop stop)
{
    switch (stop) {
    case STOP_GAIN:
        return "gain";
    case STOP_LIST:
        return "list";
    case STOP_READS:
        return "reads";
    case STOP_NONE:
        break;
    }
    return "none";
}

/* ---- time ---- */

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* For explain alone: asking the clock costs as much as scoring a vector. */
static double phase_begin(const struct disk_search *s)
{
    struct timespec t;

    if (!s->params.explain)
        return 0;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void phase_end(const struct disk_search *s, double begin, float *sum)
{
    if (s->params.explain)
        *sum += (float)(phase_begin(s) - begin);
}

/* ---- hits ---- */

static bool hit_before(const struct search_hit *hit, float distance, int64_t key)
{
    return hit->distance < distance || (hit->distance == distance && hit->key < key);
}

static void hit_insert(struct disk_search *s, float distance, uint32_t position, int64_t key)
{
    uint32_t low = 0, high = s->hit_count;

    if (high == s->params.k &&
        !(distance < s->hits[high - 1].distance ||
          (distance == s->hits[high - 1].distance && key < s->hits[high - 1].key)))
        return;
    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (hit_before(&s->hits[middle], distance, key))
            low = middle + 1;
        else
            high = middle;
    }
    if (s->hit_count == s->params.k)
        s->hit_count--;
    memmove(&s->hits[low + 1], &s->hits[low], (s->hit_count - low) * sizeof *s->hits);
    s->hits[low] = (struct search_hit){position, distance, key};
    s->hit_count++;
    s->hits_changed = true;
}

/* ---- estimates ---- */

/* Adds the estimate of one code to the list. For squared distances the error of an estimate is
 * 2 (q - c) . (c - x) with c the decoded code: normal, of variance 4 |q - c|^2 times the code's
 * distortion a dimension; for inner products (q . (x - c)), |q|^2 times that. */
static void estimate_add(struct disk_search *s, uint32_t position, float estimate)
{
    const struct disk_index *index = s->index;
    float distortion = quantiser_code_distortion(
        index->quantiser, index->codes + (uint64_t)position * index->code_bytes);
    float spread;

    if (index->metric == METRIC_IP) {
        spread = s->spread_factor * sqrtf(distortion);
    } else {
        float residual = estimate - distortion;

        spread = s->spread_factor * sqrtf((residual > 0 ? residual : 0) * distortion);
    }
    candidate_list_add(&s->list, estimate * s->estimate_scale, position,
                       disk_index_page(index, position), spread, LISTED_UNREAD);
}

/* The largest sum whose estimate could still enter the list. */
static uint16_t sum_limit(const struct disk_search *s)
{
    const struct candidate_list *list = &s->list;
    float last;

    if (list->count < list->limit || !(s->table.step > 0))
        return UINT16_MAX;
    last = list->items[list->count - 1].distance / s->estimate_scale - s->table.offset;
    if (last <= 0)
        return 0;
    last = last / s->table.step + 1;
    return last >= UINT16_MAX ? UINT16_MAX : (uint16_t)last;
}

static void batch_estimate(struct disk_search *s)
{
    const struct disk_index *index = s->index;
    uint32_t kept;

    if (!s->batch_count)
        return;
    s->scan->rows(s->table.entries, s->table.chunk_count, index->codes, index->code_bytes, s->batch,
                  s->batch_count, s->sums);
    kept = s->scan->below(s->sums, s->batch_count, sum_limit(s), s->below);
    for (uint32_t i = 0; i < kept; i++)
        estimate_add(s, s->batch[s->below[i]],
                     s->table.offset + s->table.step * (float)s->sums[s->below[i]]);
    s->stats.estimates += s->batch_count;
    s->batch_count = 0;
}

/* ---- seeds ---- */

/* Moves the `keep` smallest of distinct numbers to the front. */
static void keep_smallest(uint64_t *numbers, uint32_t count, uint32_t keep)
{
    while (count > 1 && keep > 0 && keep < count) {
        uint64_t a = numbers[0], b = numbers[count / 2], c = numbers[count - 1];
        uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        uint32_t i = 0, j = count - 1;

        for (;;) { /* Hoare: stops at the pivot itself, so i and j stay inside */
            while (numbers[i] < pivot)
                i++;
            while (numbers[j] > pivot)
                j--;
            if (i >= j)
                break;
            uint64_t held = numbers[i];

            numbers[i++] = numbers[j];
            numbers[j--] = held;
        }
        if (i == 0)
            i = 1;
        if (keep < i) {
            count = i;
        } else if (keep == i) {
            return;
        } else {
            numbers += i;
            count -= i;
            keep -= i;
        }
    }
}

static void codes_prefetch(const struct disk_index *index, uint64_t first, uint32_t count)
{
    const uint8_t *codes = index->codes + first * index->code_bytes;

    for (uint64_t at = 0; at < (uint64_t)count * index->code_bytes; at += LINE_BYTES)
        __builtin_prefetch(codes + at);
}

static uint32_t cell_run(const struct disk_index *index, uint32_t cell)
{
    uint64_t rows = cells_rows(index->cells), first = cell * rows;

    return (uint32_t)(index->row_count - first < rows ? index->row_count - first : rows);
}

static void seed(struct disk_search *s)
{
    const struct disk_index *index = s->index;
    uint32_t want = s->params.rule.cells, count = 0, keep = s->list.limit;
    uint16_t limit = UINT16_MAX;

    s->cell_count = 0;
    if (want > cells_count(index->cells))
        want = cells_count(index->cells);
    if (want)
        s->cell_count = cells_nearest(index->cells, index->kernels, index->metric, s->query.vector,
                                      want, s->cell_scratch, s->cells);
    for (uint32_t i = 0; i < s->cell_count; i++) {
        uint64_t first = (uint64_t)s->cells[i] * cells_rows(index->cells);
        uint32_t rows = cell_run(index, s->cells[i]);

        mark_set_put(&s->scanned, mark_set_find(&s->scanned, s->cells[i]), s->cells[i], 1);
        if (i + 1 < s->cell_count)
            codes_prefetch(index, (uint64_t)s->cells[i + 1] * cells_rows(index->cells),
                           cell_run(index, s->cells[i + 1]));
        for (uint32_t done = 0; done < rows; done += SCAN_RUN) {
            uint32_t run = rows - done < SCAN_RUN ? rows - done : SCAN_RUN;
            uint32_t kept;

            s->scan->run(s->table.entries, s->table.chunk_count, index->codes, index->code_bytes,
                         first + done, run, s->sums);
            kept = s->scan->below(s->sums, run, limit, s->below);
            for (uint32_t b = 0; b < kept; b++)
                s->seeds[count++] =
                    (uint64_t)s->sums[s->below[b]] << 32 | (uint32_t)(first + done + s->below[b]);
            if (count > s->seed_max - SCAN_RUN) {
                keep_smallest(s->seeds, count, keep);
                count = keep;
                limit = 0;
                for (uint32_t b = 0; b < keep; b++)
                    if (s->seeds[b] >> 32 > limit)
                        limit = (uint16_t)(s->seeds[b] >> 32);
            }
        }
        s->stats.scanned += rows;
    }
    s->stats.cells = s->cell_count;
    if (count > keep) {
        keep_smallest(s->seeds, count, keep);
        count = keep;
    }
    for (uint32_t i = 0; i < count; i++)
        if ((uint32_t)s->seeds[i] != s->hidden)
            estimate_add(s, (uint32_t)s->seeds[i],
                         s->table.offset + s->table.step * (float)(s->seeds[i] >> 32));
    if (index->entry_point != s->hidden &&
        !mark_is_set(
            &s->scanned,
            mark_set_find(&s->scanned,
                          disk_index_cell(index, disk_index_page(index, index->entry_point))))) {
        s->batch[s->batch_count++] = index->entry_point;
        batch_estimate(s);
    }
    candidate_list_merge(&s->list);
}

/* ---- pages ---- */

static int expand(struct disk_search *s, const struct page_view *view, uint32_t position)
{
    const struct disk_index *index = s->index;
    uint32_t count;

    s->stats.expanded++;
    if (page_view_neighbours(view, position - (uint32_t)view->first, s->neighbours, &count,
                             &s->error) < 0)
        return -1;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t neighbour = s->neighbours[i], page;

        /* Most neighbours of what is near the query stand in scanned cells: that goes first. */
        page = disk_index_page(index, neighbour);
        if (mark_is_set(&s->scanned, mark_set_find(&s->scanned, disk_index_cell(index, page))) ||
            !visited_add(&s->visited, neighbour) || neighbour == s->hidden ||
            mark_is_set(&s->pages, mark_set_find(&s->pages, page)))
            continue;
        if (s->batch_count == BATCH_MAX)
            batch_estimate(s);
        __builtin_prefetch(index->codes + (uint64_t)neighbour * index->code_bytes);
        s->batch[s->batch_count++] = neighbour;
    }
    return 0;
}

/* Scores `count` pages and expands what ranks. data: the pages' blocks, verified. Estimates of
 * their nodes are marked GONE by the caller: exact distances take their place. */
static int work_off(struct disk_search *s, const uint64_t *pages, const uint8_t *const *data,
                    uint32_t count)
{
    const struct disk_index *index = s->index;
    struct page_view views[RESIDENT_BATCH];
    double began = phase_begin(s);

    for (uint32_t p = 0; p < count; p++) {
        struct page_view *view = &views[p];

        if (page_view_open(&index->format, pages[p], data[p], view, &s->error) < 0)
            return -1;
        for (uint32_t slot = 0; slot < view->node_count; slot++) {
            uint32_t position = (uint32_t)view->first + slot;
            float distance;

            if (position == s->hidden)
                continue;
            distance = store_distance(&s->query, page_view_vector(view, slot));
            if (s->hit_count < s->params.k || distance <= s->hits[s->hit_count - 1].distance)
                hit_insert(s, distance, position,
                           index->format.holds_keys ? page_view_key(view, slot) : position);
            candidate_list_add(&s->list, distance, position, (uint32_t)pages[p], 0, LISTED_LOADED);
        }
        s->stats.exact += view->node_count;
    }
    candidate_list_merge(&s->list);
    phase_end(s, began, &s->stats.score_us);
    began = phase_begin(s);
    for (uint32_t i = 0; i < s->list.count; i++) {
        struct listed *item = &s->list.items[i];
        uint32_t p = 0;

        if (item->state != LISTED_LOADED)
            continue;
        item->state = LISTED_EXPANDED;
        if (i >= s->expand_limit)
            continue;
        while (pages[p] != item->page)
            p++;
        if (expand(s, &views[p], item->position) < 0)
            return -1;
    }
    batch_estimate(s);
    candidate_list_merge(&s->list);
    phase_end(s, began, &s->stats.expand_us);
    return 0;
}

/* Estimates on a page give way to what the page says. */
static void drop_estimates(struct disk_search *s, uint32_t page)
{
    for (uint32_t i = 0; i < s->list.count; i++)
        if (s->list.items[i].page == page && s->list.items[i].state <= LISTED_WANTED)
            s->list.items[i].state = LISTED_GONE;
    s->list.gone = true;
}

static int fail(struct disk_search *s)
{
    s->failed = true;
    s->wanted_count = 0;
    return -1;
}

static void ask(struct disk_search *s, const struct segment_section *section, uint64_t block,
                uint32_t blocks, uint32_t hit)
{
    uint32_t slot_index = s->free_slots[--s->free_count];
    struct page_slot *slot = &s->slots[slot_index];
    uint32_t bytes = blocks * section->block_bytes;

    slot->block = block;
    slot->blocks = blocks;
    slot->hit = hit;
    slot->arrived = false;
    slot->depth = s->depth + 1;
    slot->read = (struct reader_read){.file = section->file,
                                      .offset = segment_block_offset(section, block),
                                      .bytes = bytes,
                                      .buffer = s->buffers +
                                                (uint64_t)slot_index * s->limits.buffer_bytes_max,
                                      .owner = s};
    s->flying[(s->flying_first + s->flying_count) % s->slot_count] = slot_index;
    s->flying_count++;
    s->wanted[s->wanted_count++] = &slot->read;
    s->stats.reads += bytes / FILE_BLOCK_BYTES;
    s->stats.read_bytes += bytes;
}

/* Works off what is in memory and ranks, until nothing is left. */
static int work_off_resident(struct disk_search *s)
{
    const struct disk_index *index = s->index;
    uint64_t pages[RESIDENT_BATCH];
    const uint8_t *data[RESIDENT_BATCH];

    if (!index->resident_page_count)
        return 0;
    for (;;) {
        uint32_t count = 0;
        uint32_t limit = s->list.count < s->expand_limit ? s->list.count : s->expand_limit;

        for (uint32_t i = 0; i < limit && count < RESIDENT_BATCH; i++) {
            struct listed *item = &s->list.items[i];
            struct mark *mark;

            if (item->state != LISTED_UNREAD || item->page >= index->resident_page_count)
                continue;
            mark = mark_set_find(&s->pages, item->page);
            if (mark_is_set(&s->pages, mark))
                continue; /* in this batch already */
            if (!mark_set_put(&s->pages, mark, item->page, 1))
                break;
            pages[count] = item->page;
            data[count] = index->resident_pages + (uint64_t)item->page * index->format.page_bytes;
            __builtin_prefetch(data[count]);
            count++;
        }
        if (!count)
            return 0;
        for (uint32_t i = 0; i < s->list.count; i++) {
            struct listed *item = &s->list.items[i];

            if (item->state == LISTED_UNREAD && item->page < index->resident_page_count &&
                mark_is_set(&s->pages, mark_set_find(&s->pages, item->page)))
                item->state = LISTED_GONE;
        }
        s->list.gone = true;
        s->stats.resident_hits += count;
        if (work_off(s, pages, data, count) < 0)
            return fail(s);
    }
}

/* ---- the rule ---- */

/* P(a standard normal is below z), to about 1e-4: all that a stop rule needs. The logistic fit of
 * Page, "Approximations to the Cumulative Normal Function", 1977. */
static float normal_below(float z)
{
    return 1 / (1 + expf(-z * (1.5957691f + 0.0713535f * z * z)));
}

/* Hits still to be expected among the unread candidates whose page is not in flight. */
static float gain_left(const struct disk_search *s)
{
    float sum = 0, bound;

    if (s->hit_count < s->params.k)
        return INFINITY;
    bound = s->hits[s->hit_count - 1].distance;
    for (uint32_t i = 0; i < s->list.count; i++) {
        const struct listed *item = &s->list.items[i];
        float over = item->distance - bound;

        if (item->state != LISTED_UNREAD)
            continue;
        if (over > 4 * item->spread) {
            /* Spreads vary little from one candidate to the next. */
            if (over > 8 * item->spread)
                break;
            continue;
        }
        sum += item->spread > 0 ? normal_below(-over / item->spread) : over < 0;
    }
    return sum;
}

/* Whether to stop here; for choose() alone. */
static bool rule_met(struct disk_search *s)
{
    const struct walk_rule *rule = &s->params.rule;

    if (s->params.reads_max && s->pages_read + s->flying_count >= s->params.reads_max) {
        s->stats.stop = STOP_READS;
        return true;
    }
    if (!(rule->gain > 0) && !s->params.observe)
        return false;
    s->stats.gain = gain_left(s);
    if (s->params.observe) {
        const struct search_moment moment = {s->pages_read, s->quiet, s->stats.gain, s->hit_count,
                                             s->hits};

        s->params.observe(s->params.observe_context, &moment);
    }
    if (s->hit_count == s->params.k && s->quiet >= rule->patience && s->stats.gain < rule->gain) {
        s->stats.stop = STOP_GAIN;
        return true;
    }
    return false;
}

/* Asks for the pages of unread candidates, best first, while the beam has room and the rule wants
 * more. */
static int choose(struct disk_search *s)
{
    if (work_off_resident(s) < 0)
        return -1;
    s->stats.stop = STOP_LIST;
    for (uint32_t i = 0; i < s->list.count; i++) {
        struct listed *item = &s->list.items[i];
        struct mark *mark;

        if (item->state != LISTED_UNREAD)
            continue;
        if (item->page < s->index->resident_page_count)
            continue; /* ranks too low to be worked off */
        mark = mark_set_find(&s->pages, item->page);
        if (mark_is_set(&s->pages, mark)) { /* found after its page was asked for */
            item->state = LISTED_WANTED;
            continue;
        }
        if (s->flying_count >= s->beam_width || rule_met(s))
            return 0;
        if (!mark_set_put(&s->pages, mark, item->page, 1))
            return 0;
        for (uint32_t j = i; j < s->list.count; j++)
            if (s->list.items[j].page == item->page && s->list.items[j].state == LISTED_UNREAD)
                s->list.items[j].state = LISTED_WANTED;
        ask(s, s->index->pages, item->page, 1, 0);
    }
    return 0;
}

/* ---- exact scores ---- */

/* Asks for the originals of the hits that are still to be scored, as many as there are buffers. */
static void ask_originals(struct disk_search *s)
{
    const struct segment_section *section = s->index->originals;
    uint64_t payload = section->block_bytes - BLOCK_CRC_BYTES;
    uint64_t bytes = element_bytes(s->index->element, s->index->dim);

    for (; s->scored < s->hit_count && s->free_count; s->scored++) {
        uint64_t offset = s->hits[s->scored].position * bytes;
        uint64_t first = offset / payload, last = (offset + bytes - 1) / payload;

        ask(s, section, first, (uint32_t)(last - first + 1), s->scored);
    }
}

static int score_original(struct disk_search *s, const struct page_slot *slot)
{
    const struct disk_index *index = s->index;
    const struct segment_section *section = index->originals;
    uint32_t payload = section->block_bytes - BLOCK_CRC_BYTES;
    uint64_t bytes = element_bytes(index->element, index->dim);
    uint8_t *data = slot->read.buffer;
    const float *vector;
    float distance = 0;

    for (uint32_t b = 0; b < slot->blocks; b++) {
        if (segment_block_check(index->segment, section, slot->block + b,
                                data + (uint64_t)b * section->block_bytes, &s->error) < 0)
            return -1;
        memmove(data + (uint64_t)b * payload, data + (uint64_t)b * section->block_bytes, payload);
    }
    data += s->hits[slot->hit].position * bytes - slot->block * payload;
    memmove(slot->read.buffer, data, bytes); /* to where floats may stand */
    vector = (const float *)slot->read.buffer;
    switch (index->metric) {
    case METRIC_L2:
        distance = index->kernels->l2_f32(s->query.vector, vector, index->dim);
        break;
    case METRIC_IP:
        distance = -index->kernels->ip_f32(s->query.vector, vector, index->dim);
        break;
    case METRIC_COSINE:
        distance = 1 - index->kernels->cosine_f32(s->query.vector, vector, index->dim);
        break;
    }
    s->hits[slot->hit].distance = distance;
    s->stats.exact++;
    return 0;
}

static int compare_hits(const void *a, const void *b)
{
    const struct search_hit *x = a, *y = b;

    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return (x->key > y->key) - (x->key < y->key);
}

/* ---- the machine ---- */

static int arrival(struct disk_search *s, const struct page_slot *slot)
{
    const uint8_t *data = slot->read.buffer;
    double began = phase_begin(s);

    if (s->scoring) {
        int rc = score_original(s, slot);

        phase_end(s, began, &s->stats.exact_us);
        return rc;
    }
    if (segment_block_check(s->index->segment, s->index->pages, slot->block, data, &s->error) < 0)
        return -1;
    phase_end(s, began, &s->stats.score_us);
    drop_estimates(s, (uint32_t)slot->block);
    s->hits_changed = false;
    if (work_off(s, &slot->block, &data, 1) < 0)
        return -1;
    s->pages_read++;
    s->quiet = s->hits_changed ? 0 : s->quiet + 1;
    return 0;
}

static int advance(struct disk_search *s)
{
    if (s->params.cancelled && __atomic_load_n(s->params.cancelled, __ATOMIC_RELAXED)) {
        error_set(&s->error, ERR_CANCELLED, "the search was cancelled");
        return fail(s);
    }
    if (s->params.deadline_us && now_us() > s->params.deadline_us) {
        error_set(&s->error, ERR_TIMEOUT, "the search passed its deadline after %u reads",
                  s->stats.reads);
        return fail(s);
    }
    while (s->flying_count && s->slots[s->flying[s->flying_first]].arrived) {
        uint32_t slot_index = s->flying[s->flying_first];
        struct page_slot *slot = &s->slots[slot_index];

        s->flying_first = (s->flying_first + 1) % s->slot_count;
        s->flying_count--;
        s->depth = slot->depth > s->depth ? slot->depth : s->depth;
        if (arrival(s, slot) < 0)
            return fail(s);
        s->free_slots[s->free_count++] = slot_index;
        if (!s->scoring && choose(s) < 0)
            return -1;
    }
    if (s->flying_count == 0 && !s->scoring && s->params.exact_scores && !s->index->exact_pages)
        s->scoring = true;
    if (s->scoring) {
        if (s->flying_count == 0 && s->scored == s->hit_count)
            qsort(s->hits, s->hit_count, sizeof *s->hits, compare_hits);
        else
            ask_originals(s);
    }
    s->stats.rounds = s->depth;
    return 0;
}

static int params_check(const struct disk_search *s, const struct disk_index *index,
                        const struct search_params *params, struct error *err)
{
    struct disk_search_limits limits = s->limits;

    if (params->k < 1 || params->k > limits.k_max || params->beam_width > limits.beam_width ||
        params->rule.search_list > limits.search_list_max || params->rule.cells > limits.cells_max)
        return error_set(err, ERR_INVALID,
                         "k %u, search list %u, cells %u and beam width %u exceed what this search "
                         "was sized for (%u, %u, %u, %u)",
                         params->k, params->rule.search_list, params->rule.cells,
                         params->beam_width, limits.k_max, limits.search_list_max, limits.cells_max,
                         limits.beam_width);
    disk_search_limits_raise(&limits, index);
    if (memcmp(&limits, &s->limits, sizeof limits) != 0)
        return error_set(err, ERR_INVALID,
                         "an index of %u dimensions and pages of %u bytes exceeds what this search "
                         "was sized for",
                         index->dim, index->format.page_bytes);
    if (params->exact_scores && !index->exact_pages && !index->originals)
        return error_set(err, ERR_UNSUPPORTED,
                         "exact scores need the original vectors, which were dropped when this "
                         "index was built (--no-originals)");
    return 0;
}

int disk_search_begin(struct disk_search *s, const struct disk_index *index, const float *query,
                      const struct search_params *params, struct error *err)
{
    double began;

    if (params_check(s, index, params, err) < 0)
        return -1;
    s->index = index;
    s->params = *params;
    s->beam_width = params->beam_width ? params->beam_width : s->limits.beam_width;
    candidate_list_clear(&s->list, params->rule.search_list > params->k ? params->rule.search_list
                                                                        : params->k);
    s->expand_limit = (s->list.limit + EXPAND_PART - 1) / EXPAND_PART;
    if (s->expand_limit < params->k)
        s->expand_limit = params->k;
    s->hidden = params->hidden ? *params->hidden : UINT32_MAX;
    s->hit_count = s->batch_count = 0;
    s->flying_first = s->flying_count = s->wanted_count = s->outstanding = s->depth = 0;
    s->free_count = s->slot_count;
    for (uint32_t i = 0; i < s->slot_count; i++)
        s->free_slots[i] = i;
    s->pages_read = s->quiet = s->scored = 0;
    s->scoring = false;
    memset(&s->stats, 0, sizeof s->stats);
    error_clear(&s->error);
    s->failed = false;
    mark_set_clear(&s->pages);
    mark_set_clear(&s->scanned);
    visited_clear(&s->visited);

    began = phase_begin(s);
    store_query_prepare(&s->query, index->kernels, index->format.store, index->metric, index->dim,
                        query);
    /* Estimates are put on the scale of the exact distances; for cosine |q - x|^2 = 2 (1 - cos). */
    quantiser_table(index->quantiser, index->metric == METRIC_IP ? METRIC_IP : METRIC_L2,
                    s->query.vector, s->scratch, &s->table);
    s->estimate_scale = index->metric == METRIC_COSINE ? 0.5f : 1.0f;
    if (index->metric == METRIC_IP)
        s->spread_factor =
            sqrtf(index->kernels->norm2_f32(s->query.vector, index->dim) / (float)index->dim);
    else
        s->spread_factor = 2 * s->estimate_scale / sqrtf((float)index->dim);
    phase_end(s, began, &s->stats.prepare_us);
    began = phase_begin(s);
    seed(s);
    phase_end(s, began, &s->stats.seed_us);
    if (choose(s) == 0)
        advance(s); /* a failure here is the query's, told by disk_search_error */
    return 0;
}

uint32_t disk_search_wanted(struct disk_search *s, struct reader_read **reads, uint32_t max)
{
    uint32_t count = s->wanted_count < max ? s->wanted_count : max;

    memcpy(reads, s->wanted, count * sizeof *reads);
    memmove(s->wanted, s->wanted + count, (s->wanted_count - count) * sizeof *s->wanted);
    s->wanted_count -= count;
    s->outstanding += count;
    return count;
}

int disk_search_arrived(struct disk_search *s, struct reader_read *read, struct error *err)
{
    struct page_slot *slot =
        (struct page_slot *)(void *)((char *)read - offsetof(struct page_slot, read));

    s->outstanding--;
    slot->arrived = true;
    if (!s->failed && read->error) {
        error_set_errno(&s->error, read->error, "%s: reading block %llu at byte %llu failed",
                        s->scoring ? s->index->originals->path : s->index->pages->path,
                        (unsigned long long)slot->block, (unsigned long long)read->offset);
        fail(s);
    }
    if (!s->failed)
        advance(s);
    if (s->failed && s->error.code != ERR_NONE && err && err->code == ERR_NONE)
        *err = s->error;
    return s->failed ? -1 : 0;
}

bool disk_search_done(const struct disk_search *s)
{
    if (s->failed)
        return s->outstanding == 0;
    return s->flying_count == 0 && s->wanted_count == 0;
}

int disk_search_error(const struct disk_search *s, struct error *err)
{
    if (!s->failed)
        return 0;
    if (err && err->code == ERR_NONE)
        *err = s->error;
    return -1;
}

uint32_t disk_search_hits(struct disk_search *s, struct search_hit *hits, uint32_t max)
{
    uint32_t count = s->hit_count < max ? s->hit_count : max;

    memcpy(hits, s->hits, count * sizeof *hits);
    return count;
}

const struct search_stats *disk_search_stats(const struct disk_search *s)
{
    return &s->stats;
}
