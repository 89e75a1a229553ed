/* annd plan: what annd build will take and give, before it starts.
 *
 * Memory and disk come from build_plan.h, time and reads from a small build of a sample
 * (forecast.h). What cannot work is refused as annd build would refuse it, before the sample. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "storage/base/json_writer.h"
#include "storage/file.h"
#include "storage/reader.h"
#include "tools/build_run.h"
#include "tools/commands.h"
#include "tools/forecast.h"
#include "tools/machine_probe.h"
#include "tools/progress.h"

#define REPORT_BYTES_MAX (1u << 20)
#define PROFILES 3u
#define PROFILE_DEFAULT 1u
#define CODE_BYTES_LEAST 8u
#define SMALL_DEGREE 48u
#define MIB 1048576.0

struct profile {
    const char *name;
    char options[256]; /* of annd build, beyond those given */
    bool made;
    struct forecast_work work;
    struct build_plan plan;
    struct error why; /* when it does not fit memory or disk */
    bool fits;
    struct forecast forecast;
};

struct planning {
    const struct arguments *asked;
    const char *input;
    char folder[FILE_PATH_MAX]; /* whose disk the index is to be on */
    uint64_t memory_bytes;
    uint64_t rows_bytes; /* of memory, for keys and records */
    struct vector_source *source;
    struct pool *pool;
    struct job *job;
    struct row_shape shape;
    struct machine_disk disk;
    struct machine_memory memory;
    struct machine_cpu cpu;
    struct profile profiles[PROFILES];
};

/* ---- profiles ---- */

__attribute__((format(printf, 2, 3))) static void option_add(struct profile *p, const char *format,
                                                             ...)
{
    size_t n = strlen(p->options);
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(p->options + n, sizeof p->options - n, format, arguments);
    va_end(arguments);
}

/* Code bytes within what the memory to serve from holds, cells and tables left out. */
static uint32_t code_bytes_served(const struct planning *p, struct forecast_work work)
{
    uint64_t rows = vector_source_rows(p->source), beside;

    beside = forecast_serve_bytes(&work) - rows * work.params.code_bytes;
    if (work.params.serve_memory_bytes <= beside)
        return CODE_BYTES_LEAST;
    beside = (work.params.serve_memory_bytes - beside) / rows;
    return beside < CODE_BYTES_LEAST ? CODE_BYTES_LEAST
           : beside > UINT32_MAX     ? UINT32_MAX
                                     : (uint32_t)beside;
}

/* Half the codes, fewer edges, floats in 8 bits and not kept beside. What was asked for stays. */
static void make_small(const struct planning *p, struct profile *small)
{
    struct segment_build_params *params = &small->work.params;
    uint32_t bytes = params->code_bytes / 2;

    if (params->serve_memory_bytes && code_bytes_served(p, small->work) < bytes)
        bytes = code_bytes_served(p, small->work);
    bytes = bytes < CODE_BYTES_LEAST ? CODE_BYTES_LEAST : bytes;
    if (!option_given(p->asked, "code-bytes") && bytes < params->code_bytes) {
        params->code_bytes = bytes;
        option_add(small, " --code-bytes %u", bytes);
    }
    if (p->shape.element == ELEMENT_F32 && !option_given(p->asked, "store")) {
        params->store = STORE_SQ8;
        option_add(small, " --store 8bit");
    }
    if (p->shape.element == ELEMENT_F32 && params->keep_originals) {
        params->keep_originals = false;
        option_add(small, " --no-originals");
    }
    if (!option_given(p->asked, "max-degree") && params->max_degree > SMALL_DEGREE) {
        params->max_degree = SMALL_DEGREE;
        option_add(small, " --max-degree %u", SMALL_DEGREE);
    }
    small->made = small->options[0] != 0;
}

/* Half as many codes again, where the memory to serve from holds them. */
static void make_roomy(const struct planning *p, struct profile *roomy)
{
    struct segment_build_params *params = &roomy->work.params;
    uint32_t bytes = params->code_bytes + params->code_bytes / 2;

    bytes = bytes > p->shape.dim ? p->shape.dim : bytes;
    if (option_given(p->asked, "code-bytes") || bytes <= params->code_bytes)
        return;
    params->code_bytes = bytes;
    if (params->serve_memory_bytes &&
        forecast_serve_bytes(&roomy->work) > params->serve_memory_bytes)
        return;
    option_add(roomy, " --code-bytes %u", bytes);
    roomy->made = true;
}

/* Text keys and records as row_input.h holds them. */
static int rows_memory(struct planning *p, const struct row_input_files *files, struct error *err)
{
    uint64_t rows = vector_source_rows(p->source);
    struct vfs_stat st;

    if (files->keys) {
        if (file_stat(vfs_posix(), files->keys, &st, err) < 0)
            return -1;
        p->rows_bytes += rows * 8 + st.bytes;
    }
    if (files->attributes) {
        if (file_stat(vfs_posix(), files->attributes, &st, err) < 0)
            return -1;
        p->rows_bytes += rows * 8 + (4u << 20);
    }
    if (p->memory_bytes <= p->rows_bytes)
        return error_set(
            err, ERR_BUDGET, "keys and attributes take %llu MiB, --memory grants %llu MiB",
            (unsigned long long)p->rows_bytes >> 20, (unsigned long long)p->memory_bytes >> 20);
    return 0;
}

static int check_fit(struct planning *p, struct profile *profile)
{
    const struct build_plan *plan = &profile->plan;
    uint64_t wanted = plan->scratch_bytes + plan->index_bytes + profile->forecast.record_bytes;

    error_clear(&profile->why);
    profile->fits = false;
    if (build_plan_check(plan, p->input, profile->work.params.memory_bytes, &profile->why) < 0)
        return -1;
    if (p->disk.free_bytes < wanted) {
        error_set(&profile->why, ERR_BUDGET,
                  "building from %s takes %llu MiB of disk (index %llu MiB, scratch files %llu MiB "
                  "while it is built); %s has %llu MiB free",
                  p->input, (unsigned long long)(wanted >> 20) + 1,
                  (unsigned long long)((plan->index_bytes + profile->forecast.record_bytes) >> 20),
                  (unsigned long long)(plan->scratch_bytes >> 20), p->folder,
                  (unsigned long long)p->disk.free_bytes >> 20);
        return -1;
    }
    profile->fits = true;
    return 0;
}

static int make_profiles(struct planning *p, struct error *err)
{
    static const char *const names[PROFILES] = {"small", "default", "roomy"};
    struct forecast_work work = {
        .source = p->source,
        .files = {option_text(p->asked, "keys"), option_text(p->asked, "attributes"),
                  option_text(p->asked, "schema"), NULL, NULL},
        .holds_keys = true,
        .reads_growth = -1,
        .pool = p->pool,
    };
    const char *only = option_text(p->asked, "profile");

    if (build_run_params(p->asked, &work.params, err) < 0 ||
        segment_build_params_check(p->source, &work.params, err) < 0 ||
        rows_memory(p, &work.files, err) < 0)
        return -1;
    work.params.memory_bytes = p->memory_bytes - p->rows_bytes;
    row_shape_init(&p->shape, work.params.metric, vector_source_type(p->source),
                   vector_source_dim(p->source));
    work.shape = p->shape;
    for (uint32_t i = 0; i < PROFILES; i++) {
        p->profiles[i].name = names[i];
        p->profiles[i].work = work;
    }
    make_small(p, &p->profiles[0]);
    p->profiles[PROFILE_DEFAULT].made = true;
    make_roomy(p, &p->profiles[2]);
    for (uint32_t i = 0; i < PROFILES; i++) {
        struct profile *profile = &p->profiles[i];

        if (strcmp(only, "all") && strcmp(only, names[i]))
            profile->made = false;
        build_plan_make(&p->shape, vector_source_rows(p->source), &profile->work.params,
                        pool_workers(p->pool), &profile->plan);
        check_fit(p, profile);
    }
    return 0;
}

/* What annd build would refuse, with a profile that it would not. */
static int refuse(struct planning *p, struct error *err)
{
    struct profile *asked = NULL, *other = NULL;

    for (uint32_t i = 0; i < PROFILES; i++) {
        if (p->profiles[i].made && (!asked || i == PROFILE_DEFAULT))
            asked = &p->profiles[i];
        if (p->profiles[i].made && p->profiles[i].fits && !other)
            other = &p->profiles[i];
    }
    if (!asked)
        return error_set(err, ERR_INVALID,
                         "there is no profile '%s' beside what the other options ask for",
                         option_text(p->asked, "profile"));
    if (asked->fits)
        return 0;
    *err = asked->why;
    if (other)
        error_remedy(err, "this fits:%s", other->options);
    return -1;
}

/* ---- the report ---- */

static void print_seconds(char *out, size_t bytes, double seconds)
{
    if (seconds < 120)
        snprintf(out, bytes, "%.0f s", seconds);
    else if (seconds < 7200)
        snprintf(out, bytes, "%.0f min", seconds / 60);
    else
        snprintf(out, bytes, "%.1f h", seconds / 3600);
}

static void print_bytes(char *out, size_t bytes, uint64_t value)
{
    double mib = (double)value / MIB;

    if (mib < 10)
        snprintf(out, bytes, "%.1f MiB", mib);
    else if (mib < 10240)
        snprintf(out, bytes, "%.0f MiB", mib);
    else
        snprintf(out, bytes, "%.1f GiB", mib / 1024);
}

#define CELL_BYTES 96u

/* Writes the cell of one profile in a line of the table. */
typedef void (*cell_fn)(const struct planning *p, const struct profile *profile, uint32_t number,
                        char *out);

static void line(const struct planning *p, const char *label, cell_fn cell, uint32_t number)
{
    char out[CELL_BYTES];

    printf("%-22s", label);
    for (uint32_t i = 0; i < PROFILES; i++)
        if (p->profiles[i].made) {
            out[0] = 0;
            cell(p, &p->profiles[i], number, out);
            printf("  %-28s", out);
        }
    printf("\n");
}

static void cell_name(const struct planning *p, const struct profile *profile, uint32_t number,
                      char *out)
{
    (void)p, (void)number;
    snprintf(out, CELL_BYTES, "%s", profile->name);
}

static void cell_codes(const struct planning *p, const struct profile *profile, uint32_t number,
                       char *out)
{
    const struct segment_build_params *params = &profile->work.params;

    (void)p, (void)number;
    snprintf(out, CELL_BYTES, "%u bytes, %s, %u edges", params->code_bytes,
             store_name((enum vector_store)params->store), params->max_degree);
}

static void cell_memory(const struct planning *p, const struct profile *profile, uint32_t number,
                        char *out)
{
    (void)number;
    print_bytes(out, CELL_BYTES, profile->plan.memory_bytes + p->rows_bytes);
}

static void cell_phase(const struct planning *p, const struct profile *profile, uint32_t number,
                       char *out)
{
    print_bytes(out, CELL_BYTES - 16, profile->plan.phases[number].bytes + p->rows_bytes);
    if (number == profile->plan.greatest)
        strcat(out, " (greatest)");
}

static void cell_index(const struct planning *p, const struct profile *profile, uint32_t number,
                       char *out)
{
    (void)p, (void)number;
    print_bytes(out, CELL_BYTES, profile->plan.index_bytes + profile->forecast.record_bytes);
}

static void cell_scratch(const struct planning *p, const struct profile *profile, uint32_t number,
                         char *out)
{
    (void)p, (void)number;
    print_bytes(out, CELL_BYTES, profile->plan.scratch_bytes);
}

static void cell_fits(const struct planning *p, const struct profile *profile, uint32_t number,
                      char *out)
{
    (void)p, (void)number;
    snprintf(out, CELL_BYTES, "%s", profile->fits ? "yes" : "NO");
}

static void cell_time(const struct planning *p, const struct profile *profile, uint32_t number,
                      char *out)
{
    char expected[24], low[24], high[24];
    const struct forecast *f = &profile->forecast;

    (void)p, (void)number;
    if (!profile->fits)
        return;
    print_seconds(expected, sizeof expected, f->seconds);
    if (f->seconds_high < 120) {
        snprintf(out, CELL_BYTES, "%s (%.0f..%.0f)", expected, f->seconds_low, f->seconds_high);
        return;
    }
    print_seconds(low, sizeof low, f->seconds_low);
    print_seconds(high, sizeof high, f->seconds_high);
    snprintf(out, CELL_BYTES, "%s (%s..%s)", expected, low, high);
}

static void cell_serve(const struct planning *p, const struct profile *profile, uint32_t number,
                       char *out)
{
    const struct forecast *f = &profile->forecast;
    uint64_t granted = profile->work.params.serve_memory_bytes;

    (void)p, (void)number;
    if (!profile->fits)
        return;
    print_bytes(out, 32, f->serve_bytes);
    if (granted && granted < f->serve_bytes_min)
        strcat(out, " (TOO MUCH)");
    else if (f->resident_share > 0)
        snprintf(out + strlen(out), CELL_BYTES - strlen(out), " (%.0f %% of pages)",
                 100 * f->resident_share);
}

static void cell_reads(const struct planning *p, const struct profile *profile, uint32_t number,
                       char *out)
{
    const struct forecast *f = &profile->forecast;

    (void)p;
    if (!profile->fits)
        return;
    if (f->points[number].reads >= 0)
        snprintf(out, CELL_BYTES, "%.1f (%.1f..%.1f)", f->points[number].reads,
                 f->points[number].reads_low, f->points[number].reads_high);
    else
        snprintf(out, CELL_BYTES, f->query_count ? "not reached" : "too few rows to tell");
}

static void print_table(const struct planning *p)
{
    const struct profile *any = &p->profiles[PROFILE_DEFAULT];
    char free_text[32], memory[32];

    for (uint32_t i = 0; i < PROFILES; i++)
        any = any->made ? any : &p->profiles[i];
    print_bytes(free_text, sizeof free_text, p->disk.free_bytes);
    print_bytes(memory, sizeof memory, p->memory_bytes);
    printf("%s: %llu rows of %u %s, %s\n%u threads, %s of memory; %s free on the disk of %s\n\n",
           p->input, (unsigned long long)vector_source_rows(p->source), p->shape.dim,
           element_name(p->shape.element), metric_name(p->shape.metric), pool_workers(p->pool),
           memory, free_text, p->folder);
    line(p, "", cell_name, 0);
    line(p, "codes, pages", cell_codes, 0);
    line(p, "memory to build", cell_memory, 0);
    for (uint32_t i = 0; i < any->plan.phase_count; i++) {
        char label[32];

        snprintf(label, sizeof label, "  %s", any->plan.phases[i].name);
        line(p, label, cell_phase, i);
    }
    line(p, "index on disk", cell_index, 0);
    line(p, "scratch while building", cell_scratch, 0);
    line(p, "fits", cell_fits, 0);
    line(p, "time to build", cell_time, 0);
    line(p, "memory to serve from", cell_serve, 0);
    printf("reads a query, k 10\n");
    for (uint32_t i = 0; i < FORECAST_RECALLS; i++) {
        static const char *const labels[FORECAST_RECALLS] = {
            "  at a recall of 0.90", "  at a recall of 0.95", "  at a recall of 0.99"};

        line(p, labels[i], cell_reads, i);
    }
    printf("\ntime and reads are scaled from builds of %u rows; %.0f MB/s written, %.0f MB/s read, "
           "4 KiB in %.0f us\n",
           any->forecast.sample_rows, p->disk.write_per_second * 1e-6,
           p->disk.read_per_second * 1e-6, p->disk.random_seconds * 1e6);
    if (p->cpu.load > 1.5 * p->cpu.allowed)
        printf("this machine is busy (load %.1f on %u processors): on an idle one it is faster\n",
               p->cpu.load, p->cpu.allowed);
    for (uint32_t i = 0; i < PROFILES; i++) {
        const struct profile *profile = &p->profiles[i];

        if (!profile->made)
            continue;
        if (!profile->fits)
            printf("%s does not fit: %.*s\n", profile->name,
                   (int)strcspn(profile->why.message, "\n"), profile->why.message);
        else if (profile->options[0])
            printf("%s: annd build with%s\n", profile->name, profile->options);
    }
}

static void json_profile(struct json_writer *w, const struct planning *p,
                         const struct profile *profile)
{
    const struct build_plan *plan = &profile->plan;
    const struct forecast *f = &profile->forecast;

    json_begin_object(w);
    json_key(w, "name"), json_string(w, profile->name);
    json_key(w, "options");
    json_string(w, profile->options[0] ? profile->options + 1 : "");
    json_key(w, "fits"), json_bool(w, profile->fits);
    if (!profile->fits)
        json_key(w, "why"), json_string(w, profile->why.message);
    json_key(w, "code_bytes"), json_uint64(w, profile->work.params.code_bytes);
    json_key(w, "max_degree"), json_uint64(w, profile->work.params.max_degree);
    json_key(w, "memory_bytes"), json_uint64(w, plan->memory_bytes + p->rows_bytes);
    json_key(w, "greatest_phase"), json_string(w, plan->phases[plan->greatest].name);
    json_key(w, "phases"), json_begin_array(w);
    for (uint32_t i = 0; i < plan->phase_count; i++) {
        json_begin_object(w);
        json_key(w, "name"), json_string(w, plan->phases[i].name);
        json_key(w, "what"), json_string(w, plan->phases[i].what);
        json_key(w, "memory_bytes"), json_uint64(w, plan->phases[i].bytes + p->rows_bytes);
        json_end_object(w);
    }
    json_end_array(w);
    json_key(w, "scratch_bytes"), json_uint64(w, plan->scratch_bytes);
    json_key(w, "index_bytes"), json_uint64(w, plan->index_bytes + f->record_bytes);
    if (profile->fits) {
        json_key(w, "sample_rows"), json_uint64(w, f->sample_rows);
        json_key(w, "seconds"), json_double(w, f->seconds);
        json_key(w, "seconds_low"), json_double(w, f->seconds_low);
        json_key(w, "seconds_high"), json_double(w, f->seconds_high);
        json_key(w, "disk_seconds"), json_double(w, f->disk_seconds);
        json_key(w, "times"), json_begin_array(w);
        for (uint32_t i = 0; i < f->phase_count; i++) {
            json_begin_object(w);
            json_key(w, "phase"), json_string(w, f->phases[i].name);
            json_key(w, "sample_seconds"), json_double(w, f->phases[i].seconds);
            json_key(w, "seconds"), json_double(w, f->phases[i].expected);
            json_end_object(w);
        }
        json_end_array(w);
        json_key(w, "serve_bytes_min"), json_uint64(w, f->serve_bytes_min);
        json_key(w, "serve_bytes"), json_uint64(w, f->serve_bytes);
        json_key(w, "resident_share"), json_double(w, f->resident_share);
        json_key(w, "reads_growth"), json_double(w, f->reads_growth);
        json_key(w, "recall"), json_begin_array(w);
        for (uint32_t i = 0; i < FORECAST_RECALLS; i++) {
            if (f->points[i].reads < 0)
                continue;
            json_begin_object(w);
            json_key(w, "k"), json_uint64(w, 10);
            json_key(w, "recall"), json_double(w, f->points[i].recall);
            json_key(w, "reads"), json_double(w, f->points[i].reads);
            json_key(w, "reads_low"), json_double(w, f->points[i].reads_low);
            json_key(w, "reads_high"), json_double(w, f->points[i].reads_high);
            json_end_object(w);
        }
        json_end_array(w);
    }
    json_end_object(w);
}

static int print_json(const struct planning *p, struct error *err)
{
    struct json_writer w;
    const char *text;
    size_t bytes;
    int rc = -1;

    json_writer_init(&w, REPORT_BYTES_MAX);
    json_begin_object(&w);
    json_key(&w, "input"), json_string(&w, p->input);
    json_key(&w, "rows"), json_uint64(&w, vector_source_rows(p->source));
    json_key(&w, "dim"), json_uint64(&w, p->shape.dim);
    json_key(&w, "element"), json_string(&w, element_name(p->shape.element));
    json_key(&w, "metric"), json_string(&w, metric_name(p->shape.metric));
    json_key(&w, "threads"), json_uint64(&w, pool_workers(p->pool));
    json_key(&w, "memory_bytes"), json_uint64(&w, p->memory_bytes);
    json_key(&w, "load"), json_double(&w, p->cpu.load);
    json_key(&w, "folder"), json_string(&w, p->folder);
    json_key(&w, "free_bytes"), json_uint64(&w, p->disk.free_bytes);
    json_key(&w, "write_bytes_per_second"), json_double(&w, p->disk.write_per_second);
    json_key(&w, "read_bytes_per_second"), json_double(&w, p->disk.read_per_second);
    json_key(&w, "random_read_seconds"), json_double(&w, p->disk.random_seconds);
    json_key(&w, "profiles"), json_begin_array(&w);
    for (uint32_t i = 0; i < PROFILES; i++)
        if (p->profiles[i].made)
            json_profile(&w, p, &p->profiles[i]);
    json_end_array(&w);
    json_end_object(&w);
    if (json_writer_finish(&w, &text, &bytes, err) == 0) {
        printf("%s\n", text);
        rc = 0;
    }
    json_writer_release(&w);
    return rc;
}

/* ---- the whole ---- */

/* The default first: it measures how reads grow, for all of them. */
static int forecast_all(struct planning *p, struct error *err)
{
    static const uint32_t order[PROFILES] = {PROFILE_DEFAULT, 0, 2};
    double growth = -1;

    for (uint32_t i = 0; i < PROFILES; i++) {
        struct profile *profile = &p->profiles[order[i]];

        if (!profile->made || !profile->fits)
            continue;
        profile->work.reads_growth = growth;
        if (forecast_make(&profile->work, &profile->plan, &p->disk, &p->memory, p->folder,
                          &profile->forecast, err) < 0)
            return -1;
        growth = profile->forecast.reads_growth;
        check_fit(p, profile); /* now that the records' size is known */
    }
    return refuse(p, err);
}

static int run(const struct arguments *arguments, struct error *err)
{
    struct planning *p = calloc(1, sizeof *p);
    const char *folder = option_text(arguments, "folder");
    char reason[256];
    int rc = -1;

    if (!p)
        return error_set(err, ERR_NOMEM, "no memory to plan with");
    reader_probe(reason); /* forks: before any thread */
    p->asked = arguments;
    p->input = arguments->positional[0];
    p->memory_bytes = option_u64(arguments, "memory");
    if (!p->memory_bytes)
        p->memory_bytes = build_run_memory_default();
    if (folder)
        snprintf(p->folder, sizeof p->folder, "%s", folder);
    else
        file_path_folder(p->folder, p->input);
    machine_probe_memory(&p->memory);
    machine_probe_cpu(&p->cpu);
    if (vector_source_open(vfs_posix(), p->input, &p->source, err) < 0 ||
        pool_new(option_u32(arguments, "threads"), &p->pool, err) < 0)
        goto done;
    if (vfs_posix()->space(vfs_posix(), p->folder, &p->disk.free_bytes) < 0)
        p->disk.free_bytes = UINT64_MAX; /* machine_probe_disk says why */
    p->job = progress_job(arguments, err);
    if (!p->job || make_profiles(p, err) < 0 || refuse(p, err) < 0 ||
        machine_probe_disk(p->folder, MACHINE_DISK_BYTES, &p->disk, err) < 0 ||
        forecast_all(p, err) < 0)
        goto done;
    if (!strcasecmp(option_text(arguments, "output"), "json")) {
        rc = print_json(p, err);
    } else {
        print_table(p);
        rc = 0;
    }
done:
    progress_end(p->job);
    vector_source_close(p->source);
    pool_free(p->pool);
    free(p);
    return rc;
}

static const struct option options[] = {
    {"metric", OPTION_TEXT, "METRIC", "l2", "l2|ip|cosine", "distance", 0, 0},
    {"memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of the build, by default 90 % of the machine", 1, UINT64_MAX},
    {"serve-memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "memory it will be searched with; by default the codes alone", 1, UINT64_MAX},
    {"folder", OPTION_TEXT, "DIR", NULL, NULL,
     "where the index is to be made, by default beside the input: its disk is measured", 0, 0},
    {"profile", OPTION_TEXT, "WHICH", "all", "all|small|default|roomy",
     "what to plan; default is what annd build does with these options", 0, 0},
    {"keys", OPTION_TEXT, "FILE", NULL, NULL, "as of annd build", 0, 0},
    {"attributes", OPTION_TEXT, "FILE", NULL, NULL, "as of annd build", 0, 0},
    {"schema", OPTION_TEXT, "FILE", NULL, NULL, "as of annd build", 0, 0},
    {"code", OPTION_TEXT, "KIND", "auto", "auto|pq|opq|scalar", "as of annd build", 0, 0},
    {"own-distortion", OPTION_TEXT, "WHETHER", "auto", "auto|yes|no", "as of annd build", 0, 0},
    {"code-bytes", OPTION_NUMBER, "N", NULL, NULL,
     "bytes of codes a row, by default dim/4 within 16..192", 1, 32767},
    {"store", OPTION_TEXT, "FORM", "auto", "auto|f32|f16|8bit", "vectors on the pages", 0, 0},
    {"no-originals", OPTION_FLAG, NULL, NULL, NULL, "do not keep the original floats", 0, 0},
    {"max-degree", OPTION_NUMBER, "R", "64", NULL, "edges a node at most", 4, 256},
    {"build-list", OPTION_NUMBER, "L", "100", NULL, "candidates per insertion", 4, 4096},
    {"builder", OPTION_TEXT, "WHICH", "auto", "auto|batch|insert", "as of annd build", 0, 0},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "worker threads, by default all cores", 1, 1024},
    {"seed", OPTION_NUMBER, "N", "1", NULL, "as of annd build; also of the sample", 0, 0},
    {"output", OPTION_TEXT, "FORM", "table", "table|json", "form of the answer", 0, 0},
    {0},
};

const struct command command_plan = {
    .name = "plan",
    .positional = "INPUT",
    .summary = "tell what a build will take: memory, disk, time, and what its index will do",
    .examples = "  annd plan base.u8bin --memory 2G\n"
                "  annd plan base.fbin --metric cosine --serve-memory 1G --folder /data\n"
                "  annd plan base.fbin --profile default --output json\n",
    .options = options,
    .run = run,
};
