/* Nanoseconds per call of every distance kernel on every instruction set this CPU has, and per row
 * of the code look-ups; and of what a search keeps its books with, which has no kernels.
 * Usage: bench_kernels [NAME_PART] prints the kernels whose name contains it.
 *
 * Operands rotate through enough vectors to defeat a lucky alignment but stay in the second-level
 * cache: this measures arithmetic, not memory. Each figure is the best of several short runs, which
 * on a shared machine is the one least disturbed. The scans take random cells, or lists of rows, of
 * a million codes, or of as many as fit the second-level cache ("near", as the neighbours of a walk
 * that has seen its surroundings). */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "index/candidate_list.h"
#include "index/code_scan.h"
#include "index/distance.h"
#include "storage/base/random.h"

#define VECTORS 16u
#define RUNS 7u
#define RUN_NS 3e6
#define DIM_MAX 2048u
#define VECTOR_BYTES (4 * DIM_MAX + 192) /* not a power of two: all cache sets are used */
#define SCAN_CODES (1u << 20)
#define SCAN_CHUNKS_MAX 129u
#define SCAN_CELL 80u
#define CELLS (SCAN_CODES / SCAN_CELL)
#define SCAN_CELLS 100u /* of a search */
#define SCAN_SUMS (SCAN_CELLS * SCAN_CELL)
#define SCAN_LIST 32u /* rows a call: what is new among a node's neighbours */
#define SCAN_LISTS 4096u
#define NEAR_BYTES (256u << 10)
#define HUGE_PAGE ((size_t)2 << 20)
#define CODE_BYTES (((size_t)SCAN_CODES * SCAN_CHUNKS_MAX + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE)
#define BELOW_COUNT 4096u
#define BURST 32u   /* candidates at about the same distance */
#define BURSTS 24u  /* of a search */
#define PAGES 2048u /* of a search */

struct bench {
    const struct distance_kernels *table;
    const struct code_scan_kernels *scan;
    uint32_t dim;
    uint8_t *a, *b;      /* VECTORS x VECTOR_BYTES, small halves: fit for any element type */
    float *lookup;       /* DIM_MAX x 256 */
    uint8_t *codes;      /* SCAN_CODES x SCAN_CHUNKS_MAX */
    float *out;          /* DIM_MAX */
    uint16_t *entries;   /* SCAN_CHUNKS_MAX x 256 */
    uint32_t *scan_rows; /* SCAN_LISTS x SCAN_LIST, below SCAN_CODES */
    uint32_t *near_rows; /* the same, in NEAR_BYTES */
    uint16_t *sums;      /* SCAN_SUMS */
    uint32_t *hits;      /* BELOW_COUNT */
    struct candidate_list list;
    struct page_set pages;
    volatile float sink; /* keeps the results alive */
};

static double now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

#define KERNELS(X)                                                                                 \
    X(l2_f32, k->l2_f32(a, b, dim))                                                                \
    X(ip_f32, k->ip_f32(a, b, dim))                                                                \
    X(cosine_f32, k->cosine_f32(a, b, dim))                                                        \
    X(norm2_f32, k->norm2_f32(a, dim))                                                             \
    X(l2_f16, k->l2_f16(a, b, dim))                                                                \
    X(ip_f16, k->ip_f16(a, b, dim))                                                                \
    X(cosine_f16, k->cosine_f16(a, b, dim))                                                        \
    X(norm2_f16, k->norm2_f16(a, dim))                                                             \
    X(l2_u8, (float)k->l2_u8(a, b, dim))                                                           \
    X(ip_u8, (float)k->ip_u8(a, b, dim))                                                           \
    X(cosine_u8, k->cosine_u8(a, b, dim))                                                          \
    X(norm2_u8, (float)k->norm2_u8(a, dim))                                                        \
    X(l2_i8, (float)k->l2_i8(a, b, dim))                                                           \
    X(ip_i8, (float)k->ip_i8(a, b, dim))                                                           \
    X(cosine_i8, k->cosine_i8(a, b, dim))                                                          \
    X(norm2_i8, (float)k->norm2_i8(a, dim))                                                        \
    X(l2_f32_f16, k->l2_f32_f16(a, b, dim))                                                        \
    X(ip_f32_f16, k->ip_f32_f16(a, b, dim))                                                        \
    X(l2_f32_u8, k->l2_f32_u8(a, b, dim))                                                          \
    X(ip_f32_u8, k->ip_f32_u8(a, b, dim))                                                          \
    X(l2_f32_i8, k->l2_f32_i8(a, b, dim))                                                          \
    X(ip_f32_i8, k->ip_f32_i8(a, b, dim))                                                          \
    X(f32_from_f16, (k->f32_from_f16(b, bench->out, dim), bench->out[0]))                          \
    X(f16_from_f32, (k->f16_from_f32(a, (void *)bench->out, dim), bench->out[0]))

/* One timed loop per kernel, so that the call is the only thing in it. */
#define DEFINE_LOOP(name, call)                                                                    \
    static void loop_##name(struct bench *bench, uint32_t calls)                                   \
    {                                                                                              \
        const struct distance_kernels *k = bench->table;                                           \
        uint32_t dim = bench->dim;                                                                 \
        float sum = 0;                                                                             \
                                                                                                   \
        for (uint32_t i = 0; i < calls; i++) {                                                     \
            const void *a = bench->a + i % VECTORS * VECTOR_BYTES;                                 \
            const void *b = bench->b + i * 7 % VECTORS * VECTOR_BYTES;                             \
                                                                                                   \
            (void)a;                                                                               \
            (void)b;                                                                               \
            sum += call;                                                                           \
        }                                                                                          \
        bench->sink = sum;                                                                         \
    }
KERNELS(DEFINE_LOOP)

/* A search's cells, at random places. */
static void loop_scan_spans(struct bench *bench, uint32_t calls)
{
    struct code_span spans[SCAN_CELLS];

    for (uint32_t i = 0; i < calls; i++) {
        for (uint32_t s = 0; s < SCAN_CELLS; s++) {
            uint32_t row = bench->scan_rows[(i * SCAN_CELLS + s) % (SCAN_LISTS * SCAN_LIST)];

            spans[s] = (struct code_span){(uint64_t)(row % CELLS) * SCAN_CELL, SCAN_CELL};
        }
        bench->scan->spans(bench->entries, bench->dim, bench->codes, bench->dim, spans, SCAN_CELLS,
                           bench->sums);
    }
}

/* The same cells over and over, in the second-level cache. */
static void loop_scan_spans_near(struct bench *bench, uint32_t calls)
{
    struct code_span spans[SCAN_CELLS];
    uint32_t cells = NEAR_BYTES / bench->dim / SCAN_CELL;

    for (uint32_t s = 0; s < SCAN_CELLS; s++)
        spans[s] = (struct code_span){(uint64_t)(s * 7 % cells) * SCAN_CELL, SCAN_CELL};
    for (uint32_t i = 0; i < calls; i++)
        bench->scan->spans(bench->entries, bench->dim, bench->codes, bench->dim, spans, SCAN_CELLS,
                           bench->sums);
}

static void loop_scan_rows(struct bench *bench, uint32_t calls)
{
    for (uint32_t i = 0; i < calls; i++)
        bench->scan->rows(bench->entries, bench->dim, bench->codes, bench->dim,
                          bench->scan_rows + i % SCAN_LISTS * SCAN_LIST, SCAN_LIST, bench->sums);
}

static void loop_scan_near(struct bench *bench, uint32_t calls)
{
    for (uint32_t i = 0; i < calls; i++)
        bench->scan->rows(bench->entries, bench->dim, bench->codes, bench->dim,
                          bench->near_rows + i % SCAN_LISTS * SCAN_LIST, SCAN_LIST, bench->sums);
}

/* dim of a thousand sums are within the limit. */
static void loop_scan_below(struct bench *bench, uint32_t calls)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < BELOW_COUNT; i++)
        bench->sums[i] = (uint16_t)(i * 40503u);
    for (uint32_t i = 0; i < calls; i++)
        found += bench->scan->below(bench->sums, BELOW_COUNT, (uint16_t)(bench->dim * 65535 / 1000),
                                    bench->hits);
    bench->sink = (float)found;
}

/* The dim-th smallest of a search's sums. */
static void loop_scan_nth(struct bench *bench, uint32_t calls)
{
    uint32_t found = 0;

    for (uint32_t i = 0; i < SCAN_SUMS; i++)
        bench->sums[i] = (uint16_t)(20000 + i * 40503u % 65536 / 4 + i * 25717u % 65536 / 4);
    for (uint32_t i = 0; i < calls; i++)
        found += bench->scan->nth(bench->sums, SCAN_SUMS, bench->dim + i % 2);
    bench->sink = (float)found;
}

static void loop_table_fill(struct bench *bench, uint32_t calls)
{
    struct code_table table = {.entries = bench->entries};

    for (uint32_t i = 0; i < calls; i++)
        bench->scan->fill(&table, bench->lookup, bench->dim);
    bench->sink = table.step;
}

/* A search's candidates, nearer ones as it goes on: BURSTS times BURST. */
static void loop_candidates(struct bench *bench, uint32_t calls)
{
    struct candidate_list *list = &bench->list;

    for (uint32_t i = 0; i < calls; i++) {
        candidate_list_clear(list, bench->dim);
        for (uint32_t b = 0; b < BURSTS; b++) {
            for (uint32_t j = 0; j < BURST; j++) {
                uint32_t at = ((i * BURSTS + b) * BURST + j) % (SCAN_LISTS * SCAN_LIST);

                candidate_list_add(list, (float)bench->scan_rows[at] / (float)(b + 1), 1.0f,
                                   bench->scan_rows[at], at);
            }
        }
        candidate_list_cut(list);
    }
    bench->sink = list->columns.distance[0];
}

/* A search's pages: PAGES of the million, most of them met once. */
static void loop_pages(struct bench *bench, uint32_t calls)
{
    uint32_t old = 0;

    for (uint32_t i = 0; i < calls; i++) {
        page_set_clear(&bench->pages);
        for (uint32_t j = 0; j < PAGES; j++) {
            uint32_t page = bench->scan_rows[(i * PAGES + j) % (SCAN_LISTS * SCAN_LIST)];

            if (page_set_has(&bench->pages, page))
                old++;
            else
                page_set_add(&bench->pages, page);
        }
    }
    bench->sink = (float)old;
}

struct loop {
    const char *name;
    void (*run)(struct bench *bench, uint32_t calls);
    uint32_t items_per_call;
    uint32_t dims[4]; /* ends before a zero */
    bool plain;       /* the same on every instruction set: measured once */
};

#define LOOP_ENTRY(name, call) {#name, loop_##name, 1, {128, 512, 2048}, false},
static const struct loop loops[] = {
    KERNELS(LOOP_ENTRY){"scan_spans (code)", loop_scan_spans, SCAN_SUMS, {32, 64, 97, 129}, false},
    {"spans_near (code)", loop_scan_spans_near, SCAN_SUMS, {32, 64, 97, 129}, false},
    {"scan_rows (a code)", loop_scan_rows, SCAN_LIST, {32, 64, 97, 129}, false},
    {"scan_near (a code)", loop_scan_near, SCAN_LIST, {32, 64, 97, 129}, false},
    {"scan_below (a sum)", loop_scan_below, BELOW_COUNT, {1, 10, 100}, false},
    {"scan_nth", loop_scan_nth, 1, {100, 1000}, false},
    {"table_fill", loop_table_fill, 1, {32, 64, 97, 129}, false},
    {"candidates (each)", loop_candidates, BURST *BURSTS, {50, 200, 1000}, true},
    {"pages (each)", loop_pages, PAGES, {1}, true},
};

static double measure(struct bench *bench, const struct loop *loop)
{
    uint32_t calls = 16;
    double best = 0;

    for (;;) {
        double start = now_ns();

        loop->run(bench, calls);
        if (now_ns() - start >= RUN_NS || calls >= 1u << 28)
            break;
        calls *= 2;
    }
    for (uint32_t run = 0; run < RUNS; run++) {
        double start = now_ns(), each;

        loop->run(bench, calls);
        each = (now_ns() - start) / calls / loop->items_per_call;
        if (run == 0 || each < best)
            best = each;
    }
    return best;
}

static int bench_init(struct bench *bench)
{
    struct random random;
    struct error err;

    memset(bench, 0, sizeof(*bench));
    bench->a = malloc(VECTORS * VECTOR_BYTES);
    bench->b = malloc(VECTORS * VECTOR_BYTES);
    bench->lookup = malloc(DIM_MAX * 256 * sizeof(float));
    bench->codes = aligned_alloc(HUGE_PAGE, CODE_BYTES);
    bench->out = malloc(DIM_MAX * sizeof(float));
    bench->entries = aligned_alloc(64, SCAN_CHUNKS_MAX * 256 * sizeof(uint16_t));
    bench->scan_rows = malloc(SCAN_LISTS * SCAN_LIST * sizeof(uint32_t));
    bench->near_rows = malloc(SCAN_LISTS * SCAN_LIST * sizeof(uint32_t));
    bench->sums = malloc(SCAN_SUMS * sizeof(uint16_t));
    bench->hits = malloc(BELOW_COUNT * sizeof(uint32_t));
    if (!bench->a || !bench->b || !bench->lookup || !bench->codes || !bench->out ||
        !bench->entries || !bench->scan_rows || !bench->near_rows || !bench->sums || !bench->hits)
        return -1;
    if (candidate_list_init(&bench->list, 1000, &err) < 0 ||
        page_set_init(&bench->pages, PAGES, &err) < 0)
        return -1;
    madvise(bench->codes, CODE_BYTES, MADV_HUGEPAGE); /* as a search's are; it may be refused */
    random_init(&random, 1, 0);
    for (uint32_t i = 0; i < VECTORS * VECTOR_BYTES / 2; i++) {
        /* Halves, pairs of halves read as a float, and single bytes: all finite, none denormal. */
        uint16_t half_a = (uint16_t)(0x3800 + random_below(&random, 0x400));
        uint16_t half_b = (uint16_t)(0x3800 + random_below(&random, 0x400));

        memcpy(bench->a + 2 * i, &half_a, 2);
        memcpy(bench->b + 2 * i, &half_b, 2);
    }
    for (uint32_t i = 0; i < DIM_MAX * 256; i++)
        bench->lookup[i] = random_float(&random);
    for (size_t i = 0; i < (size_t)SCAN_CODES * SCAN_CHUNKS_MAX; i += 8) {
        uint64_t eight = random_u64(&random);

        memcpy(bench->codes + i, &eight, 8);
    }
    for (uint32_t i = 0; i < SCAN_CHUNKS_MAX * 256; i++)
        bench->entries[i] = (uint16_t)random_u64(&random);
    for (uint32_t i = 0; i < SCAN_LISTS * SCAN_LIST; i++)
        bench->scan_rows[i] = (uint32_t)random_below(&random, SCAN_CODES);
    return 0;
}

static void bench_release(struct bench *bench)
{
    free(bench->a);
    free(bench->b);
    free(bench->lookup);
    free(bench->codes);
    free(bench->out);
    free(bench->entries);
    free(bench->scan_rows);
    free(bench->near_rows);
    free(bench->sums);
    free(bench->hits);
    candidate_list_release(&bench->list);
    page_set_release(&bench->pages);
}

int main(int argc, char **argv)
{
    struct bench bench;
    struct random random;

    if (bench_init(&bench) < 0) {
        fprintf(stderr, "bench_kernels: out of memory\n");
        bench_release(&bench);
        return 1;
    }
    random_init(&random, 2, 0);
    printf("ns per call; best on this machine: %s\n%-18s %5s", distance_kernels_best()->name,
           "kernel", "dim");
    for (int isa = 0; isa < ISA_COUNT; isa++) {
        if (distance_kernels_for((enum isa)isa))
            printf(" %10s", distance_kernels_for((enum isa)isa)->name);
    }
    printf("\n");
    for (size_t l = 0; l < sizeof(loops) / sizeof(loops[0]); l++) {
        if (argc > 1 && !strstr(loops[l].name, argv[1]))
            continue;
        for (uint32_t d = 0; d < 4 && loops[l].dims[d]; d++) {
            bench.dim = loops[l].dims[d];
            for (uint32_t i = 0; i < SCAN_LISTS * SCAN_LIST; i++)
                bench.near_rows[i] = (uint32_t)random_below(&random, NEAR_BYTES / bench.dim);
            printf("%-18s %5u", loops[l].name, bench.dim);
            for (int isa = 0; isa < ISA_COUNT; isa++) {
                bench.table = distance_kernels_for((enum isa)isa);
                bench.scan = code_scan_kernels_for((enum isa)isa);
                if (bench.table && !(loops[l].plain && isa != ISA_SCALAR))
                    printf(" %10.1f", measure(&bench, &loops[l]));
            }
            printf("\n");
            fflush(stdout);
        }
    }
    bench_release(&bench);
    return 0;
}
