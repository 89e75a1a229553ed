/* Nanoseconds per call of every distance kernel on every instruction set this CPU has, and per row
 * of the code look-ups. Usage: bench_kernels [NAME_PART] prints the kernels whose name contains it.
 *
 * Operands rotate through enough vectors to defeat a lucky alignment but stay in the second-level
 * cache: this measures arithmetic, not memory. Each figure is the best of several short runs, which
 * on a shared machine is the one least disturbed. Code rows are spread over 32 MiB. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "index/distance.h"
#include "storage/base/random.h"

#define VECTORS 16u
#define RUNS 7u
#define RUN_NS 3e6
#define DIM_MAX 2048u
#define VECTOR_BYTES (4 * DIM_MAX + 192) /* not a power of two: all cache sets are used */
#define CODE_BYTES (32u << 20)
#define ADC_ROWS 64u
#define ADC_LISTS 256u

struct bench {
    const struct distance_kernels *table;
    uint32_t dim;
    uint8_t *a, *b;      /* VECTORS x VECTOR_BYTES, small halves: fit for any element type */
    float *lookup;       /* DIM_MAX x 256 */
    uint8_t *codes;      /* CODE_BYTES */
    uint32_t *rows;      /* ADC_LISTS x ADC_ROWS */
    float *out;          /* DIM_MAX */
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

/* A list of ADC_ROWS random rows a call, as a search hands over the neighbours of a node. */
static void loop_adc_rows(struct bench *bench, uint32_t calls)
{
    for (uint32_t i = 0; i < calls; i++)
        bench->table->adc_rows(bench->lookup, bench->dim, bench->codes, bench->dim,
                               bench->rows + i % ADC_LISTS * ADC_ROWS, ADC_ROWS, bench->out);
}

static void loop_adc4_rows(struct bench *bench, uint32_t calls)
{
    for (uint32_t i = 0; i < calls; i++)
        bench->table->adc4_rows(bench->lookup, bench->dim, bench->codes, bench->dim / 2,
                                bench->rows + i % ADC_LISTS * ADC_ROWS, ADC_ROWS, bench->out);
}

struct loop {
    const char *name;
    void (*run)(struct bench *bench, uint32_t calls);
    uint32_t items_per_call;
    uint32_t dims[3];
};

#define LOOP_ENTRY(name, call) {#name, loop_##name, 1, {128, 512, 2048}},
static const struct loop loops[] = {
    KERNELS(LOOP_ENTRY){"adc_rows (a row)", loop_adc_rows, ADC_ROWS, {32, 64, 128}},
    {"adc4_rows (a row)", loop_adc4_rows, ADC_ROWS, {128, 512, 2048}},
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

    memset(bench, 0, sizeof(*bench));
    bench->a = malloc(VECTORS * VECTOR_BYTES);
    bench->b = malloc(VECTORS * VECTOR_BYTES);
    bench->lookup = malloc(DIM_MAX * 256 * sizeof(float));
    bench->codes = malloc(CODE_BYTES);
    bench->rows = malloc(ADC_LISTS * ADC_ROWS * sizeof(uint32_t));
    bench->out = malloc(DIM_MAX * sizeof(float));
    if (!bench->a || !bench->b || !bench->lookup || !bench->codes || !bench->rows || !bench->out)
        return -1;
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
    for (uint32_t i = 0; i < CODE_BYTES; i++)
        bench->codes[i] = (uint8_t)random_u64(&random);
    return 0;
}

static void bench_release(struct bench *bench)
{
    free(bench->a);
    free(bench->b);
    free(bench->lookup);
    free(bench->codes);
    free(bench->rows);
    free(bench->out);
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
        for (uint32_t d = 0; d < 3; d++) {
            bench.dim = loops[l].dims[d];
            for (uint32_t i = 0; i < ADC_LISTS * ADC_ROWS; i++)
                bench.rows[i] = (uint32_t)random_below(&random, CODE_BYTES / bench.dim);
            printf("%-18s %5u", loops[l].name, bench.dim);
            for (int isa = 0; isa < ISA_COUNT; isa++) {
                bench.table = distance_kernels_for((enum isa)isa);
                if (bench.table)
                    printf(" %10.1f", measure(&bench, &loops[l]));
            }
            printf("\n");
            fflush(stdout);
        }
    }
    bench_release(&bench);
    return 0;
}
