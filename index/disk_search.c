/* How the walk works.
 *
 * Seeds: the nearest cells are ranked by their centroids and their codes scanned; the best of them
 * are the first candidates. That is done in stages, as long as a stage finds enough that is better
 * than what the ones before found. (The graph's entry point is there too, for data where the cells
 * mislead.)
 *
 * A candidate is a node known by its code, whose page has not been asked for (candidate_list.h).
 * When a page arrives, every node on it is scored from its stored vector, and those that rank in
 * the nearer part of all that is known, scored or not, are expanded: their neighbours are estimated
 * in one batch and become candidates. Pages in memory cost no read, so all whose candidates rank so
 * are worked off first. Only when nothing loaded is left to expand does the query ask for more
 * pages, those of its best candidates, up to beam_width in flight; with that, all candidates of
 * such a page leave the list. So a page's buffer is free again as soon as the page has been worked
 * off.
 *
 * Before each read the rule is asked (walk_rule.h): what would one more read bring? Without one, a
 * walk ends when search_list scored nodes are nearer than the best candidate.
 *
 * Pages are worked off in the order they were asked for, whatever order they arrive in: the answer
 * is a function of the index and the query alone.
 *
 * What was seen is kept three ways. The set of pages is exact: a neighbour on a page that was read
 * or is in flight is scored there. The set of scanned cells and the filter of estimated positions
 * may forget; a position that is estimated again is recognised in the list. */
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
#define SCAN_MAX 16384u        /* codes scanned at once */
#define SPANS_MAX 1024u        /* runs of them */
#define BELOW_MAX 1024u        /* sums looked through at once */
#define VISITED_EXPECTED 1024u /* estimated neighbours of a usual walk */
/* Less than this part of the list new in a stage of cells: the next is not scanned. At 400 cells
 * that spares a third to a half of the codes for a thousandth of recall. */
#define STAGE_PART 4u
#define FIRST_CELLS 20u   /* scanned at least, if the rule has as many */
#define RESIDENT_BATCH 8u /* pages in memory worked off at once */
#define BURST_MIN 16u     /* buffers for exact_scores */
#define LINE_BYTES 64u
/* Nodes beyond this part of the list are not expanded: they rank too low to lead anywhere new. */
#define EXPAND_PART 2u
#define SHARPEST 1e30f /* of an estimate without error */

struct page_slot {
    struct reader_read read;
    uint64_t block; /* first block read */
    uint32_t blocks;
    uint32_t depth; /* dependent steps up to and including this read */
    uint32_t hit;   /* of exact_scores */
    bool arrived;
};

/* What no search needs from one step to the next: one for all searches of a thread, so that it
 * stays in cache. */
struct walk_scratch {
    struct disk_search_limits limits;
    float *floats; /* of quantiser_table */
    void *cells;   /* of cells_nearest_in_stages */
    struct code_span spans[SPANS_MAX];
    uint16_t sums[SCAN_MAX];
    uint32_t below[BATCH_MAX];
    uint32_t batch[BATCH_MAX];
    uint32_t neighbours[PAGE_DEGREE_MAX];
    float distances[RESIDENT_BATCH * PAGE_CAPACITY_MAX];
    uint32_t shares[SHARE_STEPS]; /* P(an estimate's node is nearer than a bound) by their gap */
};

struct disk_search {
    struct disk_search_limits limits;
    struct walk_scratch *scratch;
    const struct disk_index *index;
    struct search_params params;
    struct store_query query;
    struct code_table table;
    const struct code_scan_kernels *scan;
    const struct list_kernels *passes;

    struct candidate_list list;
    struct scored_list scored;
    struct search_hit *hits; /* ascending by (distance, key) */
    uint32_t hit_count;
    uint32_t hidden; /* UINT32_MAX: none */

    uint32_t *cells; /* by stage, ascending in each */
    uint32_t stage_ends[CELL_STAGES_MAX];
    uint32_t stage_count;
    uint32_t stage; /* the next */
    bool seeding;   /* begun with early reads, and not continued yet */

    struct page_set pages; /* asked for, or worked off from memory */
    struct cell_set scanned;
    struct visited visited;

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
    uint32_t originals;

    uint32_t batch_count; /* 0 between two steps */
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

uint64_t disk_search_memory_bytes(const struct disk_search_limits *limits)
{
    uint32_t capacity = list_capacity(limits);

    return sizeof(struct disk_search) + limits->dim_max * 5ull + limits->table_entries_max * 2 +
           candidate_list_memory_bytes(capacity) + scored_list_memory_bytes(capacity) +
           limits->cells_max * 4ull + limits->k_max * sizeof(struct search_hit) +
           page_set_memory_bytes(pages_expected(capacity)) +
           cell_set_memory_bytes(limits->cells_max) + visited_memory_bytes(VISITED_EXPECTED) +
           slots_of(limits) * (sizeof(struct page_slot) + 16 + (uint64_t)limits->buffer_bytes_max);
}

uint64_t walk_scratch_memory_bytes(const struct disk_search_limits *limits)
{
    return sizeof(struct walk_scratch) + limits->scratch_floats_max * 4 +
           limits->cell_scratch_bytes_max;
}

static void *aligned(uint64_t bytes)
{
    return aligned_alloc(LINE_BYTES, (bytes + LINE_BYTES) & ~(uint64_t)(LINE_BYTES - 1));
}

/* P(a standard normal is below z), to about 1e-4: all that a stop rule needs. The logistic fit of
 * Page, "Approximations to the Cumulative Normal Function", 1977. */
static float normal_below(float z)
{
    return 1 / (1 + expf(-z * (1.5957691f + 0.0713535f * z * z)));
}

int walk_scratch_new(const struct disk_search_limits *limits, struct walk_scratch **out,
                     struct error *err)
{
    struct walk_scratch *scratch = aligned(sizeof *scratch);

    if (!scratch)
        return error_set(err, ERR_NOMEM, "no memory for the searches of a thread");
    memset(scratch, 0, sizeof *scratch);
    scratch->limits = *limits;
    scratch->floats = aligned(limits->scratch_floats_max * 4);
    scratch->cells = aligned(limits->cell_scratch_bytes_max);
    if (!scratch->floats || !scratch->cells) {
        walk_scratch_free(scratch);
        return error_set(err, ERR_NOMEM, "no memory for the searches of a thread");
    }
    for (uint32_t i = 0; i < SHARE_STEPS; i++) { /* at the middle of each step */
        float gap = ((float)i + 0.5f - SHARE_STEPS / 2) / SHARE_STEPS_A_UNIT;

        scratch->shares[i] = (uint32_t)(normal_below(-gap) * SHARE_ONE + 0.5f);
    }
    *out = scratch;
    return 0;
}

void walk_scratch_free(struct walk_scratch *scratch)
{
    if (!scratch)
        return;
    free(scratch->floats);
    free(scratch->cells);
    free(scratch);
}

int disk_search_new(const struct disk_search_limits *limits, struct walk_scratch *scratch,
                    struct disk_search **out, struct error *err)
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
    if (memcmp(limits, &scratch->limits, sizeof *limits) != 0)
        return error_set(err, ERR_INVALID, "a search and its thread's scratch differ in limits");
    s = calloc(1, sizeof *s);
    if (!s)
        return error_set(err, ERR_NOMEM, "no memory for a search");
    s->limits = *limits;
    s->slot_count = slots_of(limits);
    s->scratch = scratch;
    s->query.vector = malloc(limits->dim_max * 4ull + 4);
    s->query.integers = malloc(limits->dim_max + 1ull);
    s->table.entries = aligned(limits->table_entries_max * 2);
    s->cells = malloc((limits->cells_max + 1ull) * sizeof *s->cells);
    s->hits = malloc(limits->k_max * sizeof *s->hits);
    s->slots = calloc(s->slot_count, sizeof *s->slots);
    s->flying = malloc(s->slot_count * sizeof *s->flying);
    s->free_slots = malloc(s->slot_count * sizeof *s->free_slots);
    s->wanted = malloc(s->slot_count * sizeof *s->wanted);
    s->buffers = file_buffer_alloc((uint64_t)s->slot_count * limits->buffer_bytes_max);
    if (!s->query.vector || !s->query.integers || !s->table.entries || !s->cells || !s->hits ||
        !s->slots || !s->flying || !s->free_slots || !s->wanted || !s->buffers ||
        candidate_list_init(&s->list, list_capacity(limits), err) < 0 ||
        scored_list_init(&s->scored, list_capacity(limits), err) < 0 ||
        page_set_init(&s->pages, pages_expected(list_capacity(limits)), err) < 0 ||
        cell_set_init(&s->scanned, limits->cells_max, err) < 0 ||
        visited_init(&s->visited, VISITED_EXPECTED, err) < 0) {
        disk_search_free(s);
        return error_set(err, ERR_NOMEM, "no memory for a search's scratch");
    }
    s->scan = code_scan_kernels_best();
    s->passes = list_kernels_best();
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
    free(s->cells);
    free(s->hits);
    free(s->slots);
    free(s->flying);
    free(s->free_slots);
    free(s->wanted);
    free(s->buffers);
    candidate_list_release(&s->list);
    scored_list_release(&s->scored);
    page_set_release(&s->pages);
    cell_set_release(&s->scanned);
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

/* Adds the estimate of one code to the candidates. For squared distances the error of an estimate
 * is 2 (q - c) . (c - x) with c the decoded code: normal, of variance 4 |q - c|^2 times the code's
 * distortion a dimension; for inner products (q . (x - c)), |q|^2 times that. */
static void estimate_add(struct disk_search *s, uint32_t position, uint16_t sum)
{
    const struct disk_index *index = s->index;
    float estimate = s->table.offset + s->table.step * (float)sum;
    float variance = quantiser_code_distortion(
        index->quantiser, index->codes + (uint64_t)position * index->code_bytes);
    float spread;

    if (index->metric != METRIC_IP) {
        float residual = estimate - variance;

        variance *= residual > 0 ? residual : 0;
    }
    spread = s->spread_factor * sqrtf(variance);
    candidate_list_add(&s->list, estimate * s->estimate_scale,
                       spread > 1 / SHARPEST ? 1 / spread : SHARPEST, position,
                       disk_index_page(index, position));
}

/* The largest sum whose estimate could still become a candidate. */
static uint16_t sum_limit(const struct disk_search *s)
{
    float last;

    if (s->list.bound == INFINITY || !(s->table.step > 0))
        return UINT16_MAX;
    last = s->list.bound / s->estimate_scale - s->table.offset;
    if (last <= 0)
        return 0;
    last = last / s->table.step + 1;
    return last >= UINT16_MAX ? UINT16_MAX : (uint16_t)last;
}

static void batch_estimate(struct disk_search *s)
{
    const struct disk_index *index = s->index;
    struct walk_scratch *scratch = s->scratch;
    uint32_t kept;

    if (!s->batch_count)
        return;
    s->scan->rows(s->table.entries, s->table.chunk_count, index->codes, index->code_bytes,
                  scratch->batch, s->batch_count, scratch->sums);
    kept = s->scan->below(scratch->sums, s->batch_count, sum_limit(s), scratch->below);
    for (uint32_t i = 0; i < kept; i++)
        estimate_add(s, scratch->batch[scratch->below[i]], scratch->sums[scratch->below[i]]);
    s->stats.estimates += s->batch_count;
    s->batch_count = 0;
}

/* ---- seeds ---- */

/* Scans the codes of the spans, `count` of them in all, and makes the best of them candidates.
 * Returns how many entered. */
static uint32_t seed_from(struct disk_search *s, uint32_t span_count, uint32_t count)
{
    const struct disk_index *index = s->index;
    struct walk_scratch *scratch = s->scratch;
    const struct code_span *span = scratch->spans;
    uint16_t limit = sum_limit(s);
    uint32_t start = 0; /* of the span among the sums */
    uint32_t entered = 0;

    s->scan->spans(s->table.entries, s->table.chunk_count, index->codes, index->code_bytes,
                   scratch->spans, span_count, scratch->sums);
    if (count > s->list.limit) {
        uint16_t nearest = s->scan->nth(scratch->sums, count, s->list.limit);

        limit = nearest < limit ? nearest : limit;
    }
    for (uint32_t done = 0; done < count; done += BELOW_MAX) {
        const uint16_t *sums = scratch->sums + done;
        uint32_t kept = s->scan->below(sums, count - done < BELOW_MAX ? count - done : BELOW_MAX,
                                       limit, scratch->below);

        entered += kept;
        for (uint32_t i = 0; i < kept; i++) {
            uint32_t at = done + scratch->below[i], position;

            while (at - start >= span->count)
                start += span++->count;
            position = (uint32_t)(span->first + at - start);
            if (position != s->hidden)
                estimate_add(s, position, scratch->sums[at]);
        }
    }
    s->stats.scanned += count;
    return entered;
}

/* Scans `count` cells; returns how many of their codes became candidates. */
static uint32_t scan_cells(struct disk_search *s, const uint32_t *cells, uint32_t cell_count)
{
    const struct disk_index *index = s->index;
    struct walk_scratch *scratch = s->scratch;
    uint64_t rows = cells_rows(index->cells);
    uint32_t spans = 0, count = 0, entered = 0;

    for (uint32_t i = 0; i < cell_count; i++) {
        uint64_t first = cells[i] * rows;
        uint64_t end = first + rows < index->row_count ? first + rows : index->row_count;

        cell_set_add(&s->scanned, cells[i]);
        while (first < end) {
            uint64_t run = end - first < SCAN_MAX - count ? end - first : SCAN_MAX - count;
            struct code_span *last = spans ? &scratch->spans[spans - 1] : NULL;

            if (last && last->first + last->count == first)
                last->count += (uint32_t)run;
            else
                scratch->spans[spans++] = (struct code_span){first, (uint32_t)run};
            first += run;
            count += (uint32_t)run;
            if (count == SCAN_MAX || spans == SPANS_MAX) {
                entered += seed_from(s, spans, count);
                spans = count = 0;
            }
        }
    }
    if (count)
        entered += seed_from(s, spans, count);
    s->stats.cells += cell_count;
    candidate_list_cut(&s->list);
    return entered;
}

/* Cells are scanned in stages, each with twice the cells of the one before, up to the rule's
 * number; when few of a stage's codes are better than what was found before, those of the next are
 * not looked at. Many cells are for the few queries whose neighbours are scattered. */
static void rank_cells(struct disk_search *s)
{
    const struct disk_index *index = s->index;
    uint32_t want = s->params.rule.cells, stages = want ? 1 : 0;

    if (want > cells_count(index->cells))
        want = cells_count(index->cells);
    /* All cells come unranked. */
    while (want < cells_count(index->cells) && stages < CELL_STAGES_MAX &&
           want >> stages >= FIRST_CELLS)
        stages++;
    for (uint32_t i = 0; i < stages; i++)
        s->stage_ends[i] = want >> (stages - 1 - i);
    s->stage_count = stages;
    s->stage = 0;
    cell_set_clear(&s->scanned, want);
    if (stages)
        cells_nearest_in_stages(index->cells, index->kernels, index->metric, s->query.vector,
                                s->stage_ends, stages, s->scratch->cells, s->cells);
}

static void scan_stage(struct disk_search *s)
{
    uint32_t first = s->stage ? s->stage_ends[s->stage - 1] : 0;
    uint32_t entered = scan_cells(s, s->cells + first, s->stage_ends[s->stage] - first);

    s->stage = entered * STAGE_PART < s->list.limit ? s->stage_count : s->stage + 1;
}

/* What is left of the stages, and the entry point. */
static void finish_seeds(struct disk_search *s)
{
    const struct disk_index *index = s->index;

    while (s->stage < s->stage_count)
        scan_stage(s);
    if (index->entry_point != s->hidden &&
        !cell_set_has(&s->scanned,
                      disk_index_cell(index, disk_index_page(index, index->entry_point)))) {
        s->scratch->batch[s->batch_count++] = index->entry_point;
        batch_estimate(s);
        candidate_list_cut(&s->list);
    }
}

/* ---- pages ---- */

static int expand(struct disk_search *s, const struct page_view *view, uint32_t slot)
{
    const struct disk_index *index = s->index;
    struct walk_scratch *scratch = s->scratch;
    uint32_t *neighbours = scratch->neighbours;
    uint32_t count, fresh = 0;

    s->stats.expanded++;
    if (page_view_neighbours(view, slot, neighbours, &count, &s->error) < 0)
        return -1;
    /* Most neighbours of what is near the query stand in scanned cells: that goes first. */
    for (uint32_t i = 0; i < count; i++) {
        uint32_t neighbour = neighbours[i];

        neighbours[fresh] = neighbour;
        fresh +=
            !cell_set_has(&s->scanned, disk_index_cell(index, disk_index_page(index, neighbour)));
    }
    for (uint32_t i = 0; i < fresh; i++) {
        uint32_t neighbour = neighbours[i];

        if (!visited_add(&s->visited, neighbour) || neighbour == s->hidden ||
            page_set_has(&s->pages, disk_index_page(index, neighbour)))
            continue;
        if (s->batch_count == BATCH_MAX)
            batch_estimate(s);
        __builtin_prefetch(index->codes + (uint64_t)neighbour * index->code_bytes);
        scratch->batch[s->batch_count++] = neighbour;
    }
    return 0;
}

/* How many of all that is known, scored or not, are nearer. */
static uint32_t rank_of(const struct disk_search *s, float distance)
{
    return s->passes->below(s->scored.distances, s->scored.count, distance) +
           s->passes->below(s->list.columns.distance, s->list.count, distance);
}

static void score(struct disk_search *s, const struct page_view *view, float *distances)
{
    for (uint32_t slot = 0; slot < view->node_count; slot++) {
        uint32_t position = (uint32_t)view->first + slot;
        float distance;

        distances[slot] = INFINITY;
        if (position == s->hidden)
            continue;
        distance = store_distance(&s->query, page_view_vector(view, slot));
        if (s->hit_count < s->params.k || distance <= s->hits[s->hit_count - 1].distance)
            hit_insert(s, distance, position,
                       view->format->holds_keys ? page_view_key(view, slot) : position);
        scored_list_add(&s->scored, distance);
        distances[slot] = distance;
    }
    s->stats.exact += view->node_count;
}

/* Scores `count` pages and expands what ranks. data: the pages' blocks, verified. */
static int work_off(struct disk_search *s, const uint32_t *pages, const uint8_t *const *data,
                    uint32_t count)
{
    struct walk_scratch *scratch = s->scratch;
    struct page_view views[RESIDENT_BATCH];
    float near = -INFINITY, far = INFINITY; /* known to rank, known not to */
    double began = phase_begin(s);

    for (uint32_t p = 0; p < count; p++) {
        if (page_view_open(&s->index->format, pages[p], data[p], &views[p], &s->error) < 0)
            return -1;
        score(s, &views[p], scratch->distances + p * PAGE_CAPACITY_MAX);
    }
    phase_end(s, began, &s->stats.score_us);
    began = phase_begin(s);
    for (uint32_t p = 0; p < count; p++) {
        const float *distances = scratch->distances + p * PAGE_CAPACITY_MAX;

        for (uint32_t slot = 0; slot < views[p].node_count; slot++) {
            float distance = distances[slot];

            if (distance >= far)
                continue;
            if (distance > near) {
                if (rank_of(s, distance) >= s->expand_limit) {
                    far = distance;
                    continue;
                }
                near = distance;
            }
            if (expand(s, &views[p], slot) < 0)
                return -1;
        }
    }
    batch_estimate(s);
    phase_end(s, began, &s->stats.expand_us);
    return 0;
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

/* Takes a page's candidates off the list for good: what is on it will be scored. */
static bool claim_page(struct disk_search *s, uint32_t page)
{
    if (!page_set_add(&s->pages, page))
        return false;
    s->list.count = s->passes->drop_page(&s->list.columns, s->list.count, page);
    return true;
}

/* Works off what is in memory and ranks, until nothing is left. */
static int work_off_resident(struct disk_search *s)
{
    const struct disk_index *index = s->index;
    uint32_t resident = (uint32_t)index->resident_page_count;
    uint32_t vectors_end = PAGE_HEADER_BYTES + index->format.capacity * index->format.vector_bytes;
    uint32_t pages[RESIDENT_BATCH];
    const uint8_t *data[RESIDENT_BATCH];

    if (!resident)
        return 0;
    for (;;) {
        uint32_t count = 0;

        while (count < RESIDENT_BATCH) {
            uint32_t best = s->passes->nearest(s->list.columns.distance, s->list.columns.page,
                                               s->list.count, 0, resident);

            if (best == LIST_NONE || rank_of(s, s->list.columns.distance[best]) >= s->expand_limit)
                break;
            pages[count] = s->list.columns.page[best];
            if (!claim_page(s, pages[count]))
                break;
            data[count] = index->resident_pages + (uint64_t)pages[count] * index->format.page_bytes;
            for (uint32_t at = 0; at < vectors_end; at += LINE_BYTES)
                __builtin_prefetch(data[count] + at);
            count++;
        }
        if (!count)
            return 0;
        s->stats.resident_hits += count;
        if (work_off(s, pages, data, count) < 0)
            return fail(s);
    }
}

/* ---- the rule ---- */

/* Hits still to be expected among the candidates. */
static float gain_left(const struct disk_search *s)
{
    if (s->hit_count < s->params.k)
        return INFINITY;
    return (float)s->passes->shares(s->list.columns.distance, s->list.columns.sharpness,
                                    s->list.count, s->hits[s->hit_count - 1].distance,
                                    s->scratch->shares) /
           SHARE_ONE;
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

/* Asks for the pages of the best candidates while the beam has room and the rule wants more. */
static int choose(struct disk_search *s)
{
    const struct candidate_columns *columns = &s->list.columns;

    if (work_off_resident(s) < 0)
        return -1;
    for (;;) {
        uint32_t best, page;

        s->stats.stop = STOP_LIST;
        if (s->flying_count >= s->beam_width)
            return 0;
        /* What is left on resident pages ranks too low to be worked off. */
        best = s->passes->nearest(columns->distance, columns->page, s->list.count,
                                  (uint32_t)s->index->resident_page_count, UINT32_MAX);
        if (best == LIST_NONE ||
            s->passes->below(s->scored.distances, s->scored.count, columns->distance[best]) >=
                s->list.limit ||
            rule_met(s))
            return 0;
        page = columns->page[best];
        if (!claim_page(s, page))
            return 0;
        ask(s, s->index->pages, page, 1, 0);
    }
}

/* The nearest candidates of the first cells are nearly always read in the end. */
static void ask_early(struct disk_search *s)
{
    const struct candidate_columns *columns = &s->list.columns;

    while (s->flying_count < s->beam_width &&
           !(s->params.reads_max && s->flying_count >= s->params.reads_max)) {
        uint32_t page,
            best = s->passes->nearest(columns->distance, columns->page, s->list.count,
                                      (uint32_t)s->index->resident_page_count, UINT32_MAX);

        if (best == LIST_NONE || rank_of(s, columns->distance[best]) >= s->params.k)
            return;
        page = columns->page[best];
        if (!claim_page(s, page))
            return;
        ask(s, s->index->pages, page, 1, 0);
    }
}

/* ---- exact scores ---- */

/* Asks for the originals of the hits that are still to be scored, as many as there are buffers. */
static void ask_originals(struct disk_search *s)
{
    const struct segment_section *section = s->index->originals;
    uint64_t payload = section->block_bytes - BLOCK_CRC_BYTES;
    uint64_t bytes = element_bytes(s->index->element, s->index->dim);

    for (; s->originals < s->hit_count && s->free_count; s->originals++) {
        uint64_t offset = s->hits[s->originals].position * bytes;
        uint64_t first = offset / payload, last = (offset + bytes - 1) / payload;

        ask(s, section, first, (uint32_t)(last - first + 1), s->originals);
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
    uint32_t page;

    if (s->scoring) {
        int rc = score_original(s, slot);

        phase_end(s, began, &s->stats.exact_us);
        return rc;
    }
    if (segment_block_check(s->index->segment, s->index->pages, slot->block, data, &s->error) < 0)
        return -1;
    phase_end(s, began, &s->stats.score_us);
    page = (uint32_t)slot->block;
    s->hits_changed = false;
    if (work_off(s, &page, &data, 1) < 0)
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
        if (s->flying_count == 0 && s->originals == s->hit_count)
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
    scored_list_clear(&s->scored, s->list.limit);
    s->expand_limit = (s->list.limit + EXPAND_PART - 1) / EXPAND_PART;
    if (s->expand_limit < params->k)
        s->expand_limit = params->k;
    s->hidden = params->hidden ? *params->hidden : UINT32_MAX;
    s->hit_count = s->batch_count = 0;
    s->flying_first = s->flying_count = s->wanted_count = s->outstanding = s->depth = 0;
    s->free_count = s->slot_count;
    for (uint32_t i = 0; i < s->slot_count; i++)
        s->free_slots[i] = i;
    s->pages_read = s->quiet = s->originals = 0;
    s->scoring = false;
    memset(&s->stats, 0, sizeof s->stats);
    error_clear(&s->error);
    s->failed = false;
    page_set_clear(&s->pages);
    visited_clear(&s->visited);

    began = phase_begin(s);
    store_query_prepare(&s->query, index->kernels, index->format.store, index->metric, index->dim,
                        query);
    /* Estimates are put on the scale of the exact distances; for cosine |q - x|^2 = 2 (1 - cos). */
    quantiser_table(index->quantiser, index->metric == METRIC_IP ? METRIC_IP : METRIC_L2,
                    s->query.vector, s->scratch->floats, &s->table);
    s->estimate_scale = index->metric == METRIC_COSINE ? 0.5f : 1.0f;
    if (index->metric == METRIC_IP)
        s->spread_factor =
            sqrtf(index->kernels->norm2_f32(s->query.vector, index->dim) / (float)index->dim);
    else
        s->spread_factor = 2 * s->estimate_scale / sqrtf((float)index->dim);
    phase_end(s, began, &s->stats.prepare_us);
    began = phase_begin(s);
    rank_cells(s);
    if (params->early_reads && s->stage_count > 1) {
        scan_stage(s);
        ask_early(s);
    }
    phase_end(s, began, &s->stats.seed_us);
    s->seeding = true;
    if (s->flying_count == 0)
        disk_search_continue(s);
    return 0;
}

bool disk_search_seeding(const struct disk_search *s)
{
    return s->seeding;
}

void disk_search_continue(struct disk_search *s)
{
    double began = phase_begin(s);

    s->seeding = false;
    finish_seeds(s);
    phase_end(s, began, &s->stats.seed_us);
    if (choose(s) == 0)
        advance(s); /* a failure here is the query's, told by disk_search_error */
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
    if (!s->failed && s->seeding)
        disk_search_continue(s);
    else if (!s->failed)
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
