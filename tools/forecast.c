/* How it works: scale_of() says for each phase how much longer the whole takes than the miniature,
 * and how sure that is. The constants there were fitted to builds of samples of 20,000 rows to a
 * million (u8 of 128 dimensions under L2, f32 of 512 under cosine), not to one file's sizes.
 * A phase writes its files and syncs them in the miniature too, so writing is in its time; a disk
 * that is slower over long stretches than over short ones shows as the floor disk_floor(). */
#include "tools/forecast.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "index/calibrate.h"
#include "index/cells.h"
#include "index/disk_index.h"
#include "index/leaf_graph.h"
#include "storage/base/random.h"
#include "storage/file.h"
#include "tools/field_facts.h"
#include "tools/progress.h"

#define SAMPLE_ROWS 20000u
#define SAMPLE_ROWS_MIN 10000u /* fewer leave too few queries, and leaves */
#define SAMPLE_VALUES (20000ull * 256)
#define TRAIN_ROWS 65536u
#define QUERIES_MAX 1000.0
#define QUERY_SHARE 50.0
#define QUERIES_MIN 100.0
#define CELL_ROWS 72u
#define HEAD_BYTES_MAX (64u << 20)
#define GROUP_ROWS (PARTITION_LEAF_ROWS * 48.0)
#define SMOOTH_SECONDS 0.5
#define WAIT_SECONDS 0.05
#define QUARTER 4.0
#define GROWTH_SLOWER 0.75
#define GROWTH_USUAL 0.1
#define GROWTH_MOST 0.25
#define GROWTH_ERROR 0.05
#define OWN_QUERIES 400u
#define CACHE_BYTES 2e6
#define MEMORY_BYTES 64e6

/* ---- the job of a miniature ---- */

struct watch {
    struct forecast *forecast;
    struct job *job;
    bool open; /* a phase runs */
    double began, cpu_began;
};

static double cpu_seconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void watch_report(void *context, const struct job_progress *progress)
{
    struct watch *watch = context;
    struct forecast *f = watch->forecast;

    if (progress_interrupted())
        job_cancel(watch->job);
    if (!watch->open) {
        watch->open = true;
        watch->began = progress->elapsed_seconds;
        watch->cpu_began = cpu_seconds();
    }
    if (!progress->phase_end)
        return;
    watch->open = false;
    if (f->phase_count < FORECAST_PHASES_MAX)
        f->phases[f->phase_count++] =
            (struct forecast_phase){.name = progress->phase,
                                    .seconds = progress->elapsed_seconds - watch->began,
                                    .cpu_seconds = cpu_seconds() - watch->cpu_began};
}

/* ---- scaling ---- */

struct scale {
    double times;
    double spread;
};

struct sizes {
    double rows, sample; /* of whole and miniature */
    double queries, queries_sample;
    double ratio, log_ratio; /* rows by sample, and of their logarithms */
    double stride;
    bool hold;
};

static double least(double a, double b)
{
    return a < b ? a : b;
}

/* Rows of the calibration, as segment_build takes them. */
static double queries_of(const struct segment_build_params *params, double rows)
{
    double queries = least(QUERIES_MAX, floor(rows / QUERY_SHARE));

    return params->calibrate_count ? params->calibrate_count : queries < QUERIES_MIN ? 0 : queries;
}

/* How much longer a row fetched at random takes when all of them fill so many bytes: once in the
 * processor's cache, twice as long in memory. */
static double cache_factor(double bytes)
{
    double share = log(bytes / CACHE_BYTES) / log(MEMORY_BYTES / CACHE_BYTES);

    return 1 + (share < 0 ? 0 : least(share, 1));
}

static struct scale scale_of(const char *phase, const struct sizes *s)
{
    double trained = least(s->rows, TRAIN_ROWS) / least(s->sample, TRAIN_ROWS);
    double ratio = s->ratio, grown = s->queries / (s->queries_sample > 0 ? s->queries_sample : 1);

    if (!strcmp(phase, "train"))
        return (struct scale){trained, 0.3};
    if (!strcmp(phase, "train codes")) /* k-means over the sample; PCA and comparison beside it */
        return (struct scale){0.35 + 0.65 * trained, 0.25};
    if (!strcmp(phase, "assign")) {
        /* Groups compared with a row, and what each row takes in any case, in groups' worth. */
        double self = 5 + 9600 / s->stride;

        return (struct scale){
            ratio * (s->rows / GROUP_ROWS + self) / (s->sample / GROUP_ROWS + self), 0.5};
    }
    if (!strcmp(phase, "candidates"))
        return (struct scale){pow(ratio, 1.085) * (s->hold ? 1 : 1.3), s->hold ? 0.2 : 0.4};
    if (!strcmp(phase, "edges"))
        return (struct scale){ratio * cache_factor(s->rows * s->stride) /
                                  cache_factor(s->sample * s->stride) * (s->hold ? 1 : 1.3),
                              s->hold ? 0.35 : 0.5};
    if (!strcmp(phase, "page order"))
        return (struct scale){ratio * s->log_ratio, 0.35};
    if (!strcmp(phase, "keys"))
        return (struct scale){ratio * s->log_ratio, 0.4};
    if (!strcmp(phase, "scan"))
        return (struct scale){ratio * pow(grown, 0.6), 0.4};
    if (!strcmp(phase, "scan again") || !strcmp(phase, "rank"))
        return (struct scale){grown, 0.5};
    if (!strcmp(phase, "calibrate")) /* walks are longer, and more of them need greater efforts */
        return (struct scale){grown * (1 + 0.25 * log(ratio)), 0.35};
    if (!strcmp(phase, "publish"))
        return (struct scale){1, 0.5};
    if (!strncmp(phase, "graph", 5)) /* by insertion: a search a row */
        return (struct scale){ratio * s->log_ratio * s->log_ratio, 0.35};
    return (struct scale){ratio, 0.25};
}

/* Seconds that the whole cannot do without on this disk: what is written becomes durable, and what
 * the page cache cannot hold is read again. */
static double disk_floor(const struct forecast_work *work, const struct build_plan *plan,
                         const struct forecast *f, const struct machine_disk *disk,
                         const struct machine_memory *memory)
{
    double rows = (double)vector_source_rows(work->source);
    double raw = rows * (double)work->shape.raw_bytes;
    double graph = rows * 4.0 * (work->params.max_degree + 1);
    double written =
        (double)plan->scratch_bytes + graph + (double)plan->index_bytes + (double)f->record_bytes;
    double cached = (double)machine_memory_usable(memory) - (double)plan->memory_bytes;
    double files = raw * 2 + (double)plan->scratch_bytes + (double)plan->index_bytes;
    double read = 0;

    /* The input is read three times, rows by place four times, graph and index once more. */
    if (files > cached)
        read = raw * 7 + (double)plan->scratch_bytes + (double)plan->index_bytes;
    return written / disk->write_per_second + read / disk->read_per_second;
}

/* Processors at work in a phase, as the miniature had them. A short phase says little of itself, so
 * all phases together count as SMOOTH_SECONDS more of it. What a phase without work waits for, a
 * sync, does not grow with the rows. */
static double waits_of(const struct forecast_phase *phase)
{
    return phase->cpu_seconds < WAIT_SECONDS && phase->seconds > phase->cpu_seconds
               ? phase->seconds - phase->cpu_seconds
               : 0;
}

static double processors_at_work(const struct forecast *f)
{
    double cpu = 0, wall = 0;

    for (uint32_t i = 0; i < f->phase_count; i++) {
        cpu += f->phases[i].cpu_seconds;
        wall += f->phases[i].seconds - waits_of(&f->phases[i]);
    }
    return cpu > 0 && wall > 0 ? cpu / wall : 1;
}

static void scale_time(const struct forecast_work *work, const struct build_plan *plan,
                       const struct machine_disk *disk, const struct machine_memory *memory,
                       struct forecast *f)
{
    double rows = (double)vector_source_rows(work->source), sum = 0, off = 0, square = 0, floor_s;
    double sample = f->sample_rows, usual = processors_at_work(f);
    struct machine_cpu cpu;
    const struct sizes sizes = {.rows = rows,
                                .sample = sample,
                                .queries = queries_of(&work->params, rows),
                                .queries_sample = f->query_count,
                                .ratio = rows / sample,
                                .log_ratio = log(rows) / log(sample),
                                .stride = (double)work->shape.stride,
                                .hold = plan->hold};

    for (uint32_t i = 0; i < f->phase_count; i++) {
        struct forecast_phase *phase = &f->phases[i];
        const struct scale scale = scale_of(phase->name, &sizes);
        double waits = waits_of(phase);
        double at_work = (phase->cpu_seconds + usual * SMOOTH_SECONDS) /
                         (phase->seconds - waits + SMOOTH_SECONDS);

        phase->expected = phase->cpu_seconds * scale.times / at_work + waits;
        phase->spread = scale.spread;
        sum += phase->expected;
        off += phase->expected * phase->spread;
        square += phase->expected * phase->expected * phase->spread * phase->spread;
    }
    floor_s = disk_floor(work, plan, f, disk, memory);
    /* Half of what is written and read goes on while processors work. */
    f->disk_seconds = floor_s > sum / 2 ? floor_s - sum / 2 : 0;
    /* Between errors that are one another's and errors that cancel out; and a tenth for a machine
     * that is busier or idler then than now, more where others are at work on it. */
    machine_probe_cpu(&cpu);
    off = (off + sqrt(square)) / 2 + 0.1 * sum + 0.4 * f->disk_seconds;
    if (cpu.load > 1.5 * pool_workers(work->pool))
        off += 0.2 * sum;
    f->seconds = sum + f->disk_seconds;
    f->seconds_low = f->seconds - off > 0.4 * f->seconds ? f->seconds - off : 0.4 * f->seconds;
    f->seconds_high = f->seconds + off * 1.15;
}

/* ---- memory to serve from ---- */

struct serve_sizes {
    uint64_t codes_and_cells;
    uint64_t pages;
    uint32_t page_bytes;
};

static struct serve_sizes serve_sizes_of(const struct forecast_work *work, uint64_t rows)
{
    struct serve_sizes sizes = {.page_bytes = 4096};
    struct page_format format = {.capacity = 1, .page_bytes = 4096};
    uint32_t cell_pages;

    if (page_format_choose(&format, (enum vector_store)work->params.store, work->params.metric,
                           work->shape.dim, work->params.max_degree, rows, work->holds_keys, false,
                           NULL) < 0)
        format.capacity = 1, format.page_bytes = 4096;
    cell_pages = (CELL_ROWS + format.capacity / 2) / format.capacity;
    cell_pages = cell_pages ? cell_pages : 1;
    sizes.page_bytes = format.page_bytes;
    sizes.pages = (rows + format.capacity - 1) / format.capacity;
    sizes.codes_and_cells =
        rows * work->params.code_bytes +
        cells_memory_plan((uint32_t)rows, cell_pages * format.capacity, work->shape.dim);
    return sizes;
}

/* Of a quantiser with a rotation, at most. */
static uint64_t tables_guess(const struct forecast_work *work)
{
    uint64_t dim = work->shape.dim;

    return dim * 256 * 2 + (work->params.code == CODE_PQ ? 0 : dim * dim * 2) +
           sizeof(struct disk_index) + sizeof(struct walk_calibration);
}

uint64_t forecast_serve_bytes(const struct forecast_work *work)
{
    return serve_sizes_of(work, vector_source_rows(work->source)).codes_and_cells +
           tables_guess(work);
}

static double share_of(const struct forecast_work *work, uint64_t fixed)
{
    const struct serve_sizes sizes = serve_sizes_of(work, vector_source_rows(work->source));
    uint64_t granted = work->params.serve_memory_bytes;
    double share;

    if (granted <= fixed)
        return 0;
    share = (double)(granted - fixed) / ((double)sizes.pages * sizes.page_bytes);
    return least(share, 1);
}

/* ---- what it answers ---- */

/* The curve of k 10 at the share that is nearest to the wanted one. */
static const struct walk_curve *curve_at(const struct walk_calibration *calibration, double share)
{
    const struct walk_curve *best = NULL;

    for (uint32_t i = 0; calibration && i < calibration->curve_count; i++) {
        const struct walk_curve *curve = &calibration->curves[i];

        if (curve->k == 10 && (!best || fabs((double)curve->resident_share - share) <
                                            fabs((double)best->resident_share - share)))
            best = curve;
    }
    return best;
}

static double reads_at(const struct walk_curve *curve, double recall)
{
    for (uint32_t p = 0; curve && p < curve->point_count; p++)
        if (fabs((double)curve->points[p].recall - recall) < 1e-4)
            return (double)curve->points[p].reads;
    return -1;
}

static const double recalls[FORECAST_RECALLS] = {0.90, 0.95, 0.99};

/* Reads grow with a power of the rows, and with which depends on the data: about 0.16 for SIFT's
 * vectors from 20,000 to a million rows, 0 for embeddings that lie in clusters. So it is measured,
 * between the miniature and one of a quarter of its rows; from there on the power falls off, as a
 * logarithm's does: by GROWTH_SLOWER up to fifty times the rows. */
static double growth_of(const struct walk_curve *whole, const struct walk_curve *quarter)
{
    double sum = 0;
    uint32_t count = 0;

    for (uint32_t i = 0; i < FORECAST_RECALLS; i++) {
        double large = reads_at(whole, recalls[i]), small = reads_at(quarter, recalls[i]);

        if (!(large > 0 && small > 0))
            continue;
        sum += log(large / small) / log(QUARTER);
        count++;
    }
    if (!count)
        return GROWTH_USUAL;
    sum *= GROWTH_SLOWER / count;
    return sum < 0 ? 0 : least(sum, GROWTH_MOST);
}

static void fill_points(const struct walk_calibration *calibration, double rows, struct forecast *f)
{
    const struct walk_curve *curve = curve_at(calibration, f->resident_share);
    double ratio = rows / f->sample_rows;

    for (uint32_t i = 0; i < FORECAST_RECALLS; i++) {
        double reads = reads_at(curve, recalls[i]);

        f->points[i].recall = recalls[i];
        f->points[i].reads = reads * pow(ratio, f->reads_growth);
        f->points[i].reads_low =
            0.9 * reads *
            pow(ratio, f->reads_growth > GROWTH_ERROR ? f->reads_growth - GROWTH_ERROR : 0);
        f->points[i].reads_high = 1.15 * reads * pow(ratio, f->reads_growth + GROWTH_ERROR);
    }
}

/* ---- the miniature ---- */

struct miniature {
    char folder[FILE_PATH_MAX];
    char keys[FILE_PATH_MAX], attributes[FILE_PATH_MAX];
    uint8_t *sample;
    float *queries;
    uint32_t query_count;
    struct vector_source *source;
    struct row_input rows;
    struct segment *segment;
    struct field_facts facts;
};

/* One row from each of equal stretches of the input, packed; and from OWN_QUERIES longer ones a row
 * that is not among them, as floats: both miniatures answer the same. */
static int sample_rows(const struct forecast_work *work, struct miniature *m, uint32_t count,
                       uint32_t query_count, struct error *err)
{
    uint64_t rows = vector_source_rows(work->source);
    uint32_t row_bytes = vector_source_row_bytes(work->source), dim = work->shape.dim;
    struct random random;

    m->sample = malloc((uint64_t)count * row_bytes);
    m->queries = malloc(((uint64_t)query_count + 1) * dim * sizeof *m->queries);
    if (!m->sample || !m->queries)
        return error_set(err, ERR_NOMEM, "no memory for a sample of %u rows", count);
    random_init(&random, work->params.seed, 5);
    for (uint32_t i = 0, q = 0; i < count; i++) {
        uint64_t begin = (uint64_t)i * rows / count, end = (uint64_t)(i + 1) * rows / count;
        uint64_t row = begin + random_below(&random, end - begin);

        if (vector_source_read(work->source, row, 1, m->sample + (uint64_t)i * row_bytes, err) < 0)
            return -1;
        if (q == query_count || (uint64_t)q * count / query_count != i)
            continue;
        row = row + 1 < end ? row + 1 : begin; /* the stretch has two rows at least */
        if (vector_source_read_f32(work->source, row, 1, m->queries + (uint64_t)q * dim, err) < 0)
            return -1;
        q++;
    }
    m->query_count = query_count;
    return 0;
}

/* The first `lines` lines of a text file as a file of their own. Which rows they belong to does not
 * matter here, only how large they are. */
static int head_of(const char *path, uint32_t lines, const char *to, struct error *err)
{
    uint8_t *buffer = malloc(HEAD_BYTES_MAX);
    struct vfs_file *file = NULL;
    size_t got = 0, held = 0, end = 0;
    uint32_t seen = 0;
    int rc = -1, code;

    if (!buffer) {
        error_set(err, ERR_NOMEM, "no memory to read %s", path);
        goto done;
    }
    file = file_open(vfs_posix(), path, VFS_READ, err);
    if (!file)
        goto done;
    do {
        code = vfs_posix()->pread(file, buffer + held, HEAD_BYTES_MAX - held, held, &got);
        held += code < 0 ? 0 : got;
    } while (code == 0 && got && held < HEAD_BYTES_MAX);
    if (code < 0) {
        error_set_errno(err, -code, "reading %s failed", path);
        goto done;
    }
    for (; end < held && seen < lines; end++)
        seen += buffer[end] == '\n';
    if (end == held && held && buffer[held - 1] != '\n')
        seen++;
    if (seen < lines) {
        error_set(err, ERR_INVALID, "%s has %u lines%s, %u are wanted for the sample", path, seen,
                  held == HEAD_BYTES_MAX ? " in its first 64 MiB" : "", lines);
        goto done;
    }
    rc = file_publish(vfs_posix(), to, buffer, end, err);
done:
    file_close(file, path, NULL);
    free(buffer);
    return rc;
}

static bool is_npy(const char *path)
{
    size_t n = strlen(path);

    return n > 4 && !strcmp(path + n - 4, ".npy");
}

static uint64_t section_bytes(const struct segment *segment, const char *name)
{
    const struct segment_section *section = segment_find(segment, name);

    return section ? section->block_count * section->block_bytes : 0;
}

static int miniature_build(const struct forecast_work *work, struct miniature *m,
                           struct forecast *f, struct error *err)
{
    struct row_input_files files = work->files;
    struct segment_build_params params = work->params;
    struct segment_build_result result;
    char path[FILE_PATH_MAX];
    struct watch watch = {.forecast = f};
    const struct serve_sizes small = serve_sizes_of(work, f->sample_rows);
    int rc = -1;

    if (file_path_join(m->keys, m->folder, "keys", err) < 0 ||
        file_path_join(m->attributes, m->folder, "attributes", err) < 0)
        return -1;
    if (files.keys && is_npy(files.keys))
        files.keys = NULL; /* numbers of rows are as large */
    if (files.keys) {
        if (head_of(files.keys, f->sample_rows, m->keys, err) < 0)
            return -1;
        files.keys = m->keys;
    }
    if (files.attributes) {
        if (head_of(files.attributes, f->sample_rows, m->attributes, err) < 0)
            return -1;
        files.attributes = m->attributes;
    }
    /* The share of pages in memory is to be that of the whole. */
    if (params.serve_memory_bytes) {
        uint64_t fixed = small.codes_and_cells + tables_guess(work);
        double share = share_of(work, forecast_serve_bytes(work));

        params.serve_memory_bytes =
            share > 0 ? fixed + (uint64_t)(share * (double)(small.pages * small.page_bytes)) : 1;
    }
    params.memory_bytes = 0;
    if (m->query_count) {
        params.calibrate_vectors = m->queries;
        params.calibrate_count = m->query_count;
    }
    watch.job = job_new(watch_report, &watch);
    if (!watch.job)
        return error_set(err, ERR_NOMEM, "no memory for a job");
    if (row_input_open(&files, f->sample_rows, work->shape.dim, work->shape.element, m->folder,
                       NULL, &m->rows, err) == 0 &&
        segment_build(vfs_posix(), m->folder, m->source, &m->rows.rows, &params, NULL, work->pool,
                      watch.job, &result, err) == 0 &&
        file_path_join(path, m->folder, result.name, err) == 0 &&
        segment_open(vfs_posix(), path, &m->segment, err) == 0)
        rc = field_facts_read(m->segment, 0, &m->facts, err);
    job_free(watch.job);
    return rc;
}

static int miniature_tell(const struct forecast_work *work, const struct miniature *m,
                          struct forecast *f, struct error *err)
{
    uint64_t rows = vector_source_rows(work->source), needs;
    const struct serve_sizes small = serve_sizes_of(work, f->sample_rows);
    const struct serve_sizes whole = serve_sizes_of(work, rows);
    double ratio = (double)rows / f->sample_rows;

    if (disk_index_memory_min(m->segment, 0, &needs, err) < 0)
        return -1;
    needs = needs > small.codes_and_cells ? needs - small.codes_and_cells : 0;
    f->serve_bytes_min = whole.codes_and_cells + needs;
    f->resident_share = share_of(work, f->serve_bytes_min);
    f->serve_bytes =
        f->serve_bytes_min + (uint64_t)(f->resident_share * (double)whole.pages * whole.page_bytes);
    if (work->files.attributes || work->files.keys)
        f->record_bytes = (uint64_t)((double)section_bytes(m->segment, "rows") * ratio);
    f->query_count = m->facts.calibration ? m->facts.calibration->query_count : 0;
    return 0;
}

static void miniature_release(struct miniature *m)
{
    field_facts_release(&m->facts);
    segment_close(m->segment);
    row_input_release(&m->rows);
    vector_source_close(m->source);
    free(m->sample);
    free(m->queries);
    if (m->folder[0])
        file_remove_all(vfs_posix(), m->folder, NULL);
    memset(m, 0, sizeof *m);
}

static int miniature_make(const struct forecast_work *work, const char *folder, struct miniature *m,
                          struct forecast *f, struct error *err)
{
    uint64_t rows = vector_source_rows(work->source);
    /* Every stretch that gives a query has a second row then. */
    bool own = !work->params.calibrate_count && rows / f->sample_rows >= 2;

    if (snprintf(m->folder, sizeof m->folder, "%s/.annd-plan-XXXXXX", folder) >=
        (int)sizeof m->folder) {
        m->folder[0] = 0;
        return error_set(err, ERR_INVALID, "the path %s is too long", folder);
    }
    if (!mkdtemp(m->folder)) {
        m->folder[0] = 0;
        return error_set_errno(err, errno, "%s: cannot make a temporary folder there", folder);
    }
    if (sample_rows(work, m, f->sample_rows, own ? OWN_QUERIES : 0, err) < 0 ||
        vector_source_open_memory(m->sample, work->shape.element, f->sample_rows, work->shape.dim,
                                  vector_source_name(work->source), &m->source, err) < 0 ||
        miniature_build(work, m, f, err) < 0)
        return -1;
    return 0;
}

int forecast_make(const struct forecast_work *work, const struct build_plan *plan,
                  const struct machine_disk *disk, const struct machine_memory *memory,
                  const char *folder, struct forecast *out, struct error *err)
{
    uint64_t rows = vector_source_rows(work->source), wanted = SAMPLE_VALUES / work->shape.dim;
    struct miniature *m = calloc(2, sizeof *m);
    struct forecast *small = calloc(1, sizeof *small);
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (!m || !small) {
        error_set(err, ERR_NOMEM, "no memory for a miniature");
        goto done;
    }
    wanted = wanted > SAMPLE_ROWS ? SAMPLE_ROWS : wanted;
    wanted = wanted < SAMPLE_ROWS_MIN ? SAMPLE_ROWS_MIN : wanted;
    out->sample_rows = (uint32_t)(wanted < rows ? wanted : rows);
    out->reads_growth = work->reads_growth;
    if (miniature_make(work, folder, &m[0], out, err) < 0 ||
        miniature_tell(work, &m[0], out, err) < 0)
        goto done;
    if (out->reads_growth < 0 && m[0].query_count) {
        small->sample_rows = (uint32_t)(out->sample_rows / QUARTER);
        if (miniature_make(work, folder, &m[1], small, err) < 0)
            goto done;
        out->reads_growth = growth_of(curve_at(m[0].facts.calibration, out->resident_share),
                                      curve_at(m[1].facts.calibration, out->resident_share));
    } else if (out->reads_growth < 0) {
        out->reads_growth = GROWTH_USUAL;
    }
    fill_points(m[0].facts.calibration, (double)rows, out);
    scale_time(work, plan, disk, memory, out);
    rc = 0;
done:
    for (int i = 0; m && i < 2; i++)
        miniature_release(&m[i]);
    free(small);
    free(m);
    return rc;
}
