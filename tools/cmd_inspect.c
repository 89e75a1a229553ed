/* annd inspect: what a file or a directory of ours or of vectors holds.
 *
 * Every fact goes through report_*(), which prints it as a line or as a member of one JSON object,
 * so that the two forms cannot say different things. Of an index only manifests, calibrations and
 * file lengths are read (and the header block of each section); the rest is for `annd check`. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/index_directory.h"
#include "index/truth_file.h"
#include "index/vector_file.h"
#include "storage/base/json_writer.h"
#include "storage/file.h"
#include "tools/commands.h"
#include "tools/field_facts.h"
#include "tools/progress.h"
#include "tools/vector_stats.h"

#define REPORT_BYTES_MAX (64u << 20)

/* ---- the report ---- */

struct report {
    bool json;
    struct json_writer writer;
    int depth; /* of the lines */
};

/* "code_bytes" reads "code bytes". */
static void print_label(const struct report *report, const char *key)
{
    char label[32];
    size_t n = 0;

    for (; key[n] && n < sizeof label - 1; n++)
        label[n] = key[n] == '_' ? ' ' : key[n];
    label[n] = 0;
    printf("%*s%-*s ", 2 * report->depth, "", 26 - 2 * report->depth, label);
}

static void report_text(struct report *report, const char *key, const char *text)
{
    if (report->json) {
        json_key(&report->writer, key);
        json_string(&report->writer, text);
        return;
    }
    print_label(report, key);
    printf("%s\n", text);
}

static void report_u64(struct report *report, const char *key, uint64_t value)
{
    if (report->json) {
        json_key(&report->writer, key);
        json_uint64(&report->writer, value);
        return;
    }
    print_label(report, key);
    printf("%" PRIu64 "\n", value);
}

static void report_f64(struct report *report, const char *key, double value)
{
    if (report->json) {
        json_key(&report->writer, key);
        json_double(&report->writer, value);
        return;
    }
    print_label(report, key);
    printf("%.6g\n", value);
}

static void report_bool(struct report *report, const char *key, bool value)
{
    if (report->json) {
        json_key(&report->writer, key);
        json_bool(&report->writer, value);
        return;
    }
    print_label(report, key);
    printf("%s\n", value ? "yes" : "no");
}

static void size_text(uint64_t bytes, char *out, size_t out_bytes)
{
    const char *const units[] = {"KiB", "MiB", "GiB", "TiB"};
    double size = (double)bytes / 1024;
    int unit = 0;

    for (; size >= 1024 && unit < 3; unit++)
        size /= 1024;
    snprintf(out, out_bytes, "%.1f %s", size, units[unit]);
}

static void report_bytes(struct report *report, const char *key, uint64_t bytes)
{
    char size[32];

    if (report->json) {
        report_u64(report, key, bytes);
        return;
    }
    size_text(bytes, size, sizeof size);
    print_label(report, key);
    printf("%" PRIu64 " (%s)\n", bytes, size);
}

/* The first thing said, once it is certain what `path` is. */
static void report_kind(struct report *report, const char *path, const char *kind)
{
    report_text(report, "path", path);
    report_text(report, "kind", kind);
}

/* ---- files of vectors ---- */

static void report_duplicates(struct report *report, uint64_t rows,
                              const struct vector_stats *stats)
{
    double share =
        stats->sample_rows ? (double)stats->sample_copies / (double)stats->sample_rows : 0;

    if (report->json) {
        report_u64(report, "duplicate_sample_rows", stats->sample_rows);
        report_u64(report, "duplicates_in_sample", stats->sample_copies);
        report_f64(report, "duplicate_share", share);
        return;
    }
    print_label(report, "duplicates");
    if (stats->sample_rows == rows)
        printf("%" PRIu64 " rows repeat another (%.2f %%)\n", stats->sample_copies, 100 * share);
    else
        printf("%.2f %%, from a sample of %" PRIu64 " rows\n", 100 * share, stats->sample_rows);
}

static void report_norms(struct report *report, const struct vector_stats *stats)
{
    if (report->json) {
        json_key(&report->writer, "norms");
        json_begin_object(&report->writer);
        report_f64(report, "min", stats->norm_min);
        report_f64(report, "mean", stats->norm_mean);
        report_f64(report, "max", stats->norm_max);
        report_f64(report, "deviation", stats->norm_deviation);
        json_end_object(&report->writer);
        return;
    }
    print_label(report, "norms");
    printf("min %.6g  mean %.6g  max %.6g  deviation %.3g%s\n", stats->norm_min, stats->norm_mean,
           stats->norm_max, stats->norm_deviation,
           fabs(stats->norm_min - 1) < 1e-3 && fabs(stats->norm_max - 1) < 1e-3
               ? "  (unit length: every metric ranks alike)"
               : "");
}

static int inspect_vectors(struct report *report, const struct arguments *arguments,
                           struct vector_source *source, struct error *err)
{
    struct job *job = progress_job(arguments, err);
    struct vector_stats stats;
    struct vfs_stat st;
    int rc = -1;

    if (!job)
        return -1;
    if (vector_stats_scan(source, job, &stats, err) < 0 ||
        file_stat(vfs_posix(), vector_source_name(source), &st, err) < 0)
        goto done;
    report_kind(report, vector_source_name(source), "vectors");
    report_u64(report, "rows", vector_source_rows(source));
    report_u64(report, "dimension", vector_source_dim(source));
    report_text(report, "type", element_name(vector_source_type(source)));
    report_bytes(report, "bytes", st.bytes);
    report_norms(report, &stats);
    report_u64(report, "nan_values", stats.nan_count);
    report_u64(report, "infinite_values", stats.infinity_count);
    report_u64(report, "unusable_rows", stats.bad_rows);
    if (stats.bad_rows)
        report_u64(report, "first_unusable_row", stats.first_bad_row);
    report_u64(report, "zero_vectors", stats.zero_vectors);
    report_duplicates(report, vector_source_rows(source), &stats);
    rc = 0;
done:
    progress_end(job);
    return rc;
}

static int inspect_truth(struct report *report, const char *path, struct error *err)
{
    struct truth truth = {0};
    struct vfs_stat st;
    int rc = -1;

    if (file_stat(vfs_posix(), path, &st, err) < 0 ||
        truth_file_read(vfs_posix(), path, 0, &truth, err) < 0)
        goto done;
    uint64_t count = (uint64_t)truth.query_count * truth.k;
    float least = truth.distances[0], most = truth.distances[0];
    uint32_t top = 0;
    bool rising = true, falling = true;

    for (uint64_t i = 0; i < count; i++) {
        float distance = truth.distances[i];

        top = truth.ids[i] > top ? truth.ids[i] : top;
        least = distance < least ? distance : least;
        most = distance > most ? distance : most;
        if (i % truth.k) {
            rising = rising && distance >= truth.distances[i - 1];
            falling = falling && distance <= truth.distances[i - 1];
        }
    }
    report_kind(report, path, "truth");
    report_u64(report, "queries", truth.query_count);
    report_u64(report, "neighbours", truth.k);
    report_bytes(report, "bytes", st.bytes);
    report_u64(report, "largest_id", top);
    if (isfinite(least) && isfinite(most)) {
        report_f64(report, "least_distance", (double)least);
        report_f64(report, "greatest_distance", (double)most);
    }
    report_text(report, "order",
                rising && falling ? "all distances of a query are equal"
                : rising          ? "ascending (l2, cosine)"
                : falling         ? "descending (ip)"
                                  : "neither ascending nor descending");
    rc = 0;
done:
    truth_release(&truth);
    return rc;
}

static int inspect_keys(struct report *report, const char *path, struct npy_keys *keys,
                        struct error *err)
{
    struct vfs_stat st;

    if (file_stat(vfs_posix(), path, &st, err) < 0)
        return -1;
    report_kind(report, path, "keys");
    report_u64(report, "rows", npy_keys_count(keys));
    report_bytes(report, "bytes", st.bytes);
    return 0;
}

static bool ends_with(const char *path, const char *suffix)
{
    size_t bytes = strlen(path), suffix_bytes = strlen(suffix);

    return bytes > suffix_bytes && !strcasecmp(path + bytes - suffix_bytes, suffix);
}

static int inspect_file(struct report *report, const struct arguments *arguments, const char *path,
                        struct error *err)
{
    struct vector_source *source = NULL;
    struct npy_keys *keys = NULL;
    struct error ignored = ERROR_INIT;
    int rc = -1;

    if (ends_with(path, ".bin"))
        return inspect_truth(report, path, err);
    /* The one suffix that stands for two things: a column of integers is keys. */
    if (ends_with(path, ".npy") && npy_keys_open(vfs_posix(), path, &keys, &ignored) == 0) {
        rc = inspect_keys(report, path, keys, err);
        npy_keys_close(keys);
        return rc;
    }
    if (vector_source_open(vfs_posix(), path, &source, err) < 0)
        return -1;
    rc = inspect_vectors(report, arguments, source, err);
    vector_source_close(source);
    return rc;
}

/* ---- segments ---- */

static const char *section_kind_name(enum section_kind kind)
{
    switch (kind) {
    case SECTION_PAGES:
        return "pages";
    case SECTION_CODES:
        return "codes";
    case SECTION_CELLS:
        return "cells";
    case SECTION_QUANTISER:
        return "quantiser";
    case SECTION_VECTORS:
        return "vectors";
    case SECTION_COLUMNS:
        return "columns";
    case SECTION_ROWS:
        return "rows";
    case SECTION_KEYS:
        return "keys";
    case SECTION_STATS:
        return "stats";
    }
    return "unknown";
}

static int field_u64(const struct segment *segment, uint32_t field, const char *name,
                     uint64_t *value, struct error *err)
{
    char entry[64];

    snprintf(entry, sizeof entry, "field.%u.%s", field, name);
    return manifest_get_u64_in(segment_manifest(segment), entry, 0, UINT32_MAX, value, err);
}

static void report_trials(struct report *report, const struct field_facts *facts)
{
    if (report->json) {
        json_key(&report->writer, "code_trials");
        json_begin_array(&report->writer);
        for (uint32_t i = 0; i < facts->trial_count; i++)
            json_string(&report->writer, facts->trials[i]);
        json_end_array(&report->writer);
        return;
    }
    for (uint32_t i = 0; i < facts->trial_count; i++) {
        print_label(report, i ? "" : "codes_tried");
        printf("%s\n", facts->trials[i]);
    }
}

static void report_tiers(struct report *report, const struct field_facts *facts)
{
    if (report->json) {
        json_key(&report->writer, "hot_tier_rows");
        json_begin_array(&report->writer);
        for (uint32_t i = 0; i < facts->tier_count; i++)
            json_uint64(&report->writer, facts->tier_rows[i]);
        json_end_array(&report->writer);
        return;
    }
    print_label(report, "hot_tiers");
    if (facts->tier_count) {
        printf("end at row");
        for (uint32_t i = 0; i < facts->tier_count; i++)
            printf("%s %" PRIu64, i ? "," : "", facts->tier_rows[i]);
        printf("\n");
    } else {
        printf("none\n");
    }
}

static void report_curve(struct report *report, const struct walk_curve *curve)
{
    if (report->json) {
        json_begin_object(&report->writer);
        report_u64(report, "k", curve->k);
        report_f64(report, "resident_share", (double)curve->resident_share);
        json_key(&report->writer, "points");
        json_begin_array(&report->writer);
    } else {
        printf("%*sk %u, %.4g %% of the pages in memory\n"
               "%*s  recall  reached   reads    list  cells  patience      gain\n",
               2 * report->depth, "", curve->k, 100 * (double)curve->resident_share,
               2 * report->depth, "");
    }
    for (uint32_t i = 0; i < curve->point_count; i++) {
        const struct walk_point *point = &curve->points[i];

        if (!report->json) {
            printf("%*s  %6.4g  %7.4f  %6.1f  %6u  %5u  %8u  %8.3g\n", 2 * report->depth, "",
                   (double)point->recall, (double)point->reached, (double)point->reads,
                   point->rule.search_list, point->rule.cells, point->rule.patience,
                   (double)point->rule.gain);
            continue;
        }
        json_begin_object(&report->writer);
        json_key(&report->writer, "recall"); /* as it was asked for: 0.95, not its double */
        json_float(&report->writer, point->recall);
        json_key(&report->writer, "reached");
        json_float(&report->writer, point->reached);
        json_key(&report->writer, "reads");
        json_float(&report->writer, point->reads);
        report_u64(report, "search_list", point->rule.search_list);
        report_u64(report, "cells", point->rule.cells);
        report_u64(report, "patience", point->rule.patience);
        json_key(&report->writer, "gain");
        json_float(&report->writer, point->rule.gain);
        json_end_object(&report->writer);
    }
    if (report->json) {
        json_end_array(&report->writer);
        json_end_object(&report->writer);
    }
}

static void report_calibration(struct report *report, const struct walk_calibration *calibration)
{
    if (!calibration) {
        if (report->json) {
            json_key(&report->writer, "calibration");
            json_null(&report->writer);
        } else {
            report_text(report, "calibration", "none: --recall goes by a rule of thumb");
        }
        return;
    }
    if (report->json) {
        json_key(&report->writer, "calibration");
        json_begin_object(&report->writer);
        report_u64(report, "queries", calibration->query_count);
        report_bool(report, "own_queries", calibration->own_queries);
        json_key(&report->writer, "curves");
        json_begin_array(&report->writer);
    } else {
        print_label(report, "calibration");
        printf("with %u %s\n", calibration->query_count,
               calibration->own_queries ? "queries of the user's" : "rows as queries");
    }
    report->depth++;
    for (uint32_t i = 0; i < calibration->curve_count; i++)
        report_curve(report, &calibration->curves[i]);
    report->depth--;
    if (report->json) {
        json_end_array(&report->writer);
        json_end_object(&report->writer);
    }
}

/* schema may be NULL: a segment alone does not know its fields' names. */
static int report_field(struct report *report, const struct segment *segment,
                        const struct schema *schema, uint32_t field, struct error *err)
{
    const struct schema_field *named = schema ? schema_vector(schema, field) : NULL;
    uint64_t dim, element, metric, store, kind, code_bytes, page_bytes, capacity, degree, exact,
        zeros;
    char originals[SECTION_NAME_MAX];
    struct field_facts facts;

    if (field_u64(segment, field, "dim", &dim, err) < 0 ||
        field_u64(segment, field, "element", &element, err) < 0 ||
        field_u64(segment, field, "metric", &metric, err) < 0 ||
        field_u64(segment, field, "store", &store, err) < 0 ||
        field_u64(segment, field, "code_kind", &kind, err) < 0 ||
        field_u64(segment, field, "code_bytes", &code_bytes, err) < 0 ||
        field_u64(segment, field, "page_bytes", &page_bytes, err) < 0 ||
        field_u64(segment, field, "page_capacity", &capacity, err) < 0 ||
        field_u64(segment, field, "max_degree", &degree, err) < 0 ||
        field_u64(segment, field, "exact_pages", &exact, err) < 0 ||
        field_u64(segment, field, "zero_vectors", &zeros, err) < 0)
        return -1;
    if (field_facts_read(segment, field, &facts, err) < 0) {
        field_facts_release(&facts);
        return -1;
    }
    snprintf(originals, sizeof originals, "f%u.vectors", field);
    if (report->json) {
        json_begin_object(&report->writer);
        report_u64(report, "field", field);
    } else {
        print_label(report, "field");
        printf("%u\n", field);
    }
    report->depth++;
    if (named)
        report_text(report, "name", named->name);
    report_u64(report, "dimension", dim);
    report_text(report, "type", element_name((enum element_type)element));
    report_text(report, "metric", metric_name((enum metric)metric));
    report_text(report, "store", store_name((enum vector_store)store));
    report_bool(report, "exact_vectors", exact || segment_find(segment, originals));
    report_text(report, "code", code_kind_name((enum code_kind)kind));
    report_u64(report, "code_bytes", code_bytes);
    report_u64(report, "page_bytes", page_bytes);
    report_u64(report, "page_capacity", capacity);
    if (capacity)
        report_u64(report, "pages", (segment_row_count(segment) + capacity - 1) / capacity);
    report_u64(report, "cells", facts.cell_count);
    report_u64(report, "cell_pages", facts.cell_pages);
    report_u64(report, "max_degree", degree);
    report_u64(report, "zero_vectors", zeros);
    report_trials(report, &facts);
    report_tiers(report, &facts);
    report_calibration(report, facts.calibration);
    report->depth--;
    field_facts_release(&facts);
    if (report->json)
        json_end_object(&report->writer);
    return 0;
}

/* The values of a manifest but those of `sections`, which have their own table. */
static void report_manifest(struct report *report, const struct manifest *manifest)
{
    char text[1024];

    if (report->json) {
        json_key(&report->writer, "parameters");
        json_begin_object(&report->writer);
    } else {
        printf("%*sparameters\n", 2 * report->depth, "");
    }
    report->depth++;
    for (uint32_t i = 0; i < manifest_count(manifest); i++) {
        const char *name = manifest_entry(manifest, i, text, sizeof text);
        struct error not_u64 = ERROR_INIT, not_f64 = ERROR_INIT;
        uint64_t number;
        double real;

        if (!strncmp(name, "section.", 8))
            continue;
        if (!report->json)
            printf("%*s%-25s %s\n", 2 * report->depth, "", name, text);
        else if (manifest_get_u64(manifest, name, &number, &not_u64) == 0)
            report_u64(report, name, number);
        else if (manifest_get_f64(manifest, name, &real, &not_f64) == 0 && isfinite(real))
            report_f64(report, name, real);
        else
            report_text(report, name, text);
    }
    report->depth--;
    if (report->json)
        json_end_object(&report->writer);
}

static void section_line(const struct report *report, const char *name, const char *kind,
                         uint64_t bytes, uint64_t total, uint64_t rows, const char *rest)
{
    char size[32], per_row[32] = "-";

    size_text(bytes, size, sizeof size);
    if (rows)
        snprintf(per_row, sizeof per_row, "%.1f", (double)bytes / (double)rows);
    printf("%*s%-17s %-10s %15" PRIu64 " %11s %5.1f %% %9s%s%s\n", 2 * report->depth, "", name,
           kind, bytes, size, total ? 100.0 * (double)bytes / (double)total : 0.0, per_row,
           *rest ? "  " : "", rest);
}

/* The files of a segment; their lengths add up to `total`, the segment's. */
static void report_sections(struct report *report, const struct segment *segment,
                            uint64_t manifest_bytes, uint64_t total)
{
    uint64_t rows = segment_row_count(segment);

    if (report->json) {
        json_key(&report->writer, "sections");
        json_begin_array(&report->writer);
    } else {
        printf("%*s%-17s %-10s %15s %11s %7s %9s  %s\n", 2 * report->depth, "", "section", "kind",
               "bytes", "", "share", "per row", "blocks");
    }
    for (uint32_t i = 0; i < segment_section_count(segment); i++) {
        const struct segment_section *section = segment_section_at(segment, i);

        if (report->json) {
            json_begin_object(&report->writer);
            report_text(report, "name", section->name);
            report_text(report, "kind", section_kind_name(section->kind));
            report_u64(report, "bytes", section->file_bytes);
            report_u64(report, "payload_bytes", section->payload_bytes);
            report_u64(report, "block_bytes", section->block_bytes);
            report_u64(report, "blocks", section->block_count);
            json_end_object(&report->writer);
            continue;
        }
        char blocks[64];

        snprintf(blocks, sizeof blocks, "%" PRIu64 " of %u", section->block_count,
                 section->block_bytes);
        section_line(report, section->name, section_kind_name(section->kind), section->file_bytes,
                     total, rows, blocks);
    }
    if (report->json) {
        json_end_array(&report->writer);
        report_u64(report, "manifest_bytes", manifest_bytes);
        return;
    }
    section_line(report, "segment.manifest", "manifest", manifest_bytes, total, rows, "");
    section_line(report, "total", "", total, total, rows, "");
}

/* Adds the segment's bytes to *bytes; NULL when the segment is all there is to report. */
static int report_segment(struct report *report, const char *path, const struct schema *schema,
                          uint64_t *bytes, struct error *err)
{
    char file[FILE_PATH_MAX], id[2 * DIGEST_BYTES + 1];
    struct segment *segment = NULL;
    struct vfs_stat st;
    uint64_t fields, total;
    int rc = -1;

    if (segment_open(vfs_posix(), path, &segment, err) < 0)
        return -1;
    if (file_path_join(file, path, "segment.manifest", err) < 0 ||
        file_stat(vfs_posix(), file, &st, err) < 0 ||
        manifest_get_u64_in(segment_manifest(segment), "field.count", 0, INDEX_VECTOR_FIELD_MAX,
                            &fields, err) < 0)
        goto done;
    total = st.bytes;
    for (uint32_t i = 0; i < segment_section_count(segment); i++)
        total += segment_section_at(segment, i)->file_bytes;
    digest_hex(segment_id(segment), DIGEST_BYTES, id);
    if (!bytes)
        report_kind(report, path, "segment");
    report_text(report, "id", id);
    report_u64(report, "rows", segment_row_count(segment));
    report_bytes(report, "bytes", total);
    if (report->json) {
        json_key(&report->writer, "fields");
        json_begin_array(&report->writer);
    }
    for (uint32_t f = 0; f < fields; f++)
        if (report_field(report, segment, schema, f, err) < 0)
            goto done;
    if (report->json)
        json_end_array(&report->writer);
    report_sections(report, segment, st.bytes, total);
    report_manifest(report, segment_manifest(segment));
    if (bytes)
        *bytes += total;
    rc = 0;
done:
    segment_close(segment);
    return rc;
}

/* ---- directories ---- */

static void report_schema(struct report *report, const struct schema *schema, const char *text,
                          size_t bytes)
{
    if (report->json) {
        json_key(&report->writer, "schema");
        json_raw(&report->writer, text, bytes);
        return;
    }
    for (uint32_t i = 0; i < schema->field_count; i++) {
        const struct schema_field *field = &schema->fields[i];

        print_label(report, i ? "" : "schema");
        printf("%s %s", field->name, field_type_name(field->type));
        if (field->dim)
            printf(" %u", field->dim);
        printf("%s\n", field->primary ? " (key)" : "");
    }
    report_bool(report, "dynamic_fields", schema->dynamic);
}

/* Lengths of the files that MANIFEST names outside segments. */
static int index_own_bytes(const char *path, uint64_t *bytes, struct error *err)
{
    const char *const names[] = {"MANIFEST", "schema.json"};
    char file[FILE_PATH_MAX];

    for (size_t i = 0; i < 2; i++) {
        struct vfs_stat st;

        if (file_path_join(file, path, names[i], err) < 0 ||
            file_stat(vfs_posix(), file, &st, err) < 0)
            return -1;
        *bytes += st.bytes;
    }
    return 0;
}

/* Checks by opening everything once (index_directory_files), then tells it piece by piece. */
static int inspect_index(struct report *report, const char *path, struct error *err)
{
    char file[FILE_PATH_MAX], entry[64];
    struct manifest *manifest = NULL;
    struct schema *schema = NULL;
    uint8_t *text = NULL;
    char **files = NULL;
    uint32_t file_count = 0;
    size_t text_bytes;
    uint64_t generation, segments, own = 0, total, rows = 0;
    int rc = -1;

    if (index_directory_files(vfs_posix(), path, &files, &file_count, err) < 0 ||
        file_path_join(file, path, "MANIFEST", err) < 0 ||
        manifest_read(vfs_posix(), MANIFEST_INDEX, file, &manifest, err) < 0 ||
        file_path_join(file, path, "schema.json", err) < 0 ||
        file_read_whole(vfs_posix(), file, SCHEMA_BYTES_MAX, &text, &text_bytes, err) < 0 ||
        schema_parse((const char *)text, text_bytes, file, &schema, err) < 0 ||
        manifest_get_u64(manifest, "generation", &generation, err) < 0 ||
        manifest_get_u64_in(manifest, "segment.count", 0, INDEX_SEGMENT_MAX, &segments, err) < 0 ||
        index_own_bytes(path, &own, err) < 0)
        goto done;
    for (uint32_t i = 0; i < segments; i++) {
        uint64_t segment_rows;

        snprintf(entry, sizeof entry, "segment.%03u.rows", i);
        if (manifest_get_u64(manifest, entry, &segment_rows, err) < 0)
            goto done;
        rows += segment_rows;
    }
    report_kind(report, path, "index");
    report_u64(report, "rows", rows);
    report_u64(report, "generation", generation);
    report_u64(report, "files", file_count);
    report_schema(report, schema, (const char *)text, text_bytes);
    if (report->json) {
        json_key(&report->writer, "segments");
        json_begin_array(&report->writer);
    }
    total = own;
    for (uint32_t i = 0; i < segments; i++) {
        const char *name;

        snprintf(entry, sizeof entry, "segment.%03u.name", i);
        if (manifest_get_text(manifest, entry, &name, err) < 0 ||
            file_path_join(file, path, name, err) < 0)
            goto done;
        if (report->json) {
            json_begin_object(&report->writer);
            report_text(report, "name", name);
        } else {
            printf("segment %s\n", name);
        }
        report->depth++;
        if (report_segment(report, file, schema, &total, err) < 0)
            goto done;
        report->depth--;
        if (report->json)
            json_end_object(&report->writer);
    }
    if (report->json)
        json_end_array(&report->writer);
    report_bytes(report, "manifest_and_schema_bytes", own);
    report_bytes(report, "bytes", total);
    report_manifest(report, manifest);
    rc = 0;
done:
    file_names_free(files, file_count);
    manifest_free(manifest);
    schema_free(schema);
    free(text);
    return rc;
}

static int inspect_data(struct report *report, const char *path, const char *manifest_path,
                        struct error *err)
{
    struct manifest *manifest;

    if (manifest_read(vfs_posix(), MANIFEST_DATA, manifest_path, &manifest, err) < 0)
        return -1;
    report_kind(report, path, "data directory");
    report_manifest(report, manifest);
    manifest_free(manifest);
    return 0;
}

static bool has_magic(const char *path, const char *magic)
{
    char found[8];
    struct vfs_file *file = file_open(vfs_posix(), path, VFS_READ, NULL);
    bool has = file && file_read_exact(file, path, found, sizeof found, 0, NULL) == 0 &&
               !memcmp(found, magic, sizeof found);

    file_close(file, path, NULL);
    return has;
}

static int inspect_directory(struct report *report, const char *path, struct error *err)
{
    char manifest[FILE_PATH_MAX], segment[FILE_PATH_MAX];

    if (file_path_join(manifest, path, "MANIFEST", err) < 0 ||
        file_path_join(segment, path, "segment.manifest", err) < 0)
        return -1;
    if (file_exists(vfs_posix(), segment))
        return report_segment(report, path, NULL, NULL, err);
    if (has_magic(manifest, "ANNDDATM"))
        return inspect_data(report, path, manifest, err);
    return inspect_index(report, path, err);
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *path = arguments->positional[0];
    struct report report = {.json = !strcasecmp(option_text(arguments, "output"), "json")};
    struct vfs_stat st;
    const char *text;
    size_t bytes;
    int rc = -1;

    json_writer_init(&report.writer, REPORT_BYTES_MAX);
    if (file_stat(vfs_posix(), path, &st, err) < 0)
        goto done;
    if (report.json)
        json_begin_object(&report.writer);
    if (st.kind == VFS_OTHER) {
        error_set(err, ERR_INVALID, "%s is neither a file nor a directory", path);
        goto done;
    }
    if ((st.kind == VFS_DIRECTORY ? inspect_directory(&report, path, err)
                                  : inspect_file(&report, arguments, path, err)) < 0)
        goto done;
    if (report.json) {
        json_end_object(&report.writer);
        if (json_writer_finish(&report.writer, &text, &bytes, err) < 0)
            goto done;
        printf("%s\n", text);
    }
    rc = 0;
done:
    json_writer_release(&report.writer);
    return rc;
}

static const struct option options[] = {
    {"output", OPTION_TEXT, "FORM", "table", "table|json", "form of the report", 0, 0},
    PROGRESS_OPTION,
    {0},
};

const struct command command_inspect = {
    .name = "inspect",
    .positional = "PATH",
    .summary = "tell what a vector file, truth file, segment or index holds",
    .examples = "  annd inspect base.fbin\n"
                "  annd inspect idx --output json\n",
    .options = options,
    .run = run,
};
