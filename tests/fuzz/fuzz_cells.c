/* Fuzzes cells_decode_bytes: the checksum is made right unless the first byte says otherwise, since
 * the writer of a file may be hostile. What is accepted must rank, at once and in stages, without a
 * step outside its scratch, give every instruction set the same cells, and print to the same
 * bytes. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "index/cells.h"
#include "storage/base/bytes.h"
#include "tests/support/fuzz_support.h"

/* As in cells.c: fewer cells are ranked exactly. */
#define GROUPS_FROM_CELLS 1024u

struct trial {
    const struct cells *cells;
    const struct distance_kernels *kernels;
    enum metric metric;
    const float *query;
    void *scratch;
    uint8_t *marks; /* a cell each */
    uint32_t ends[CELL_STAGES_MAX];
    uint32_t stage_count; /* 0: no cell is wanted */
};

/* Ends of stages from the input, ascending to `want`. */
static void make_stages(struct trial *trial, uint32_t want, const uint8_t *seed, size_t seed_bytes)
{
    uint32_t end = 0;

    trial->stage_count = 0;
    while (end < want) {
        uint32_t s = trial->stage_count++;
        uint32_t step = 1 + seed[seed_bytes - 1 - s] % (want / 4 + 1);

        end = s + 1 == CELL_STAGES_MAX || step > want - end ? want : end + step;
        trial->ends[s] = end;
    }
}

static void require_ascending(const uint32_t *cells, uint32_t from, uint32_t to, uint32_t count)
{
    for (uint32_t i = from; i < to; i++)
        require(cells[i] < count && (i == from || cells[i - 1] < cells[i]), "no such order");
}

/* Puts the cells in stages into out. `nearest`: room for as many. */
static void use_stages(const struct trial *t, uint32_t *nearest, uint32_t *out)
{
    uint32_t count = cells_count(t->cells), last = t->stage_count - 1, from = 0;
    uint32_t wanted = t->ends[last] < count ? t->ends[last] : count;
    uint32_t found = cells_nearest_in_stages(t->cells, t->kernels, t->metric, t->query, t->ends,
                                             t->stage_count, t->scratch, out);

    require(found == wanted, "too few cells in stages");
    memset(t->marks, 0, count);
    for (uint32_t s = 0; s <= last; s++) {
        uint32_t to = t->ends[s] < found ? t->ends[s] : found;

        require_ascending(out, from, to, count);
        for (uint32_t i = from; i < to; i++) {
            require(!t->marks[out[i]], "a cell in two stages");
            t->marks[out[i]] = 1;
        }
        /* Two levels look into more groups when more is wanted; all cells come unranked. */
        if (s == last || (count < GROUPS_FROM_CELLS && t->ends[last] < count)) {
            require(cells_nearest(t->cells, t->kernels, t->metric, t->query, t->ends[s], t->scratch,
                                  nearest) == to,
                    "stages find more or fewer");
            for (uint32_t i = 0; i < to; i++)
                require(t->marks[nearest[i]], "stages miss a cell that is nearer");
        }
        from = to;
    }
}

static void use(const struct cells *cells, uint32_t want, const uint8_t *seed, size_t seed_bytes)
{
    uint32_t dim = cells_dim(cells), count = cells_count(cells);
    uint32_t found_wanted = want < count ? want : count;
    float *query = malloc(dim * sizeof *query);
    uint32_t *first = malloc((want + 1) * sizeof *first), *out = malloc((want + 1) * sizeof *out);
    uint32_t *staged_first = malloc((want + 1) * sizeof *staged_first);
    uint32_t *staged = malloc((want + 1) * sizeof *staged);
    struct trial trial = {.cells = cells, .query = query};

    trial.scratch = aligned_alloc(64, align_up(cells_scratch_bytes(cells, want), 64));
    trial.marks = malloc((size_t)count + 1);
    require(query && first && out && staged_first && staged && trial.scratch && trial.marks,
            "no memory");
    require(cells_rows(cells) > 0 && cells_memory_bytes(cells) > 0, "cells of nothing");
    for (uint32_t d = 0; d < dim; d++) /* bits of any kind: no numbers and infinities too */
        query[d] = d % 3 ? (float)(int8_t)seed[d % seed_bytes]
                         : load_f32(seed + d % (seed_bytes - sizeof(float)));
    make_stages(&trial, want, seed, seed_bytes);
    for (int metric = METRIC_L2; metric <= METRIC_IP; metric++) {
        trial.metric = (enum metric)metric;
        for (enum isa isa = ISA_SCALAR; isa < ISA_COUNT; isa++) {
            uint32_t found;

            trial.kernels = distance_kernels_for(isa);
            if (!trial.kernels)
                continue;
            if (trial.stage_count > 0)
                use_stages(&trial, out, staged);
            found =
                cells_nearest(cells, trial.kernels, trial.metric, query, want, trial.scratch, out);
            require(found == found_wanted, "too few cells");
            require_ascending(out, 0, found, count);
            if (isa == ISA_SCALAR) {
                memcpy(first, out, found * sizeof *out);
                memcpy(staged_first, staged, found * sizeof *staged);
            }
            require(!memcmp(first, out, found * sizeof *out) &&
                        !memcmp(staged_first, staged, found * sizeof *staged),
                    "instruction sets disagree");
        }
    }
    free(query);
    free(first);
    free(out);
    free(staged_first);
    free(staged);
    free(trial.scratch);
    free(trial.marks);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct cells *cells = NULL;
    struct error err = ERROR_INIT;
    uint8_t *copy, *printed = NULL;
    size_t printed_bytes;

    if (bytes < 2)
        return 0;
    uint8_t mode = data[0];

    bytes--;
    copy = fuzz_copy(data + 1, bytes);
    if (!(mode & 1))
        fuzz_sign(copy, bytes);
    if (cells_decode_bytes(copy, bytes, "input", &cells, &err) == 0) {
        use(cells, mode >> 1, copy, bytes);
        require(cells_encode_bytes(cells, &printed, &printed_bytes, &err) == 0, "print");
        require(printed_bytes == bytes && !memcmp(printed, copy, bytes), "prints differently");
        free(printed);
    } else {
        require(cells == NULL && (err.code == ERR_CORRUPT || err.code == ERR_UNSUPPORTED),
                "another error");
    }
    cells_free(cells);
    free(copy);
    return 0;
}
