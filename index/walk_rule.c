/* How it works: a calibration is a handful of curves, one for each k and share of resident pages
 * that was measured; a curve is a handful of points that get stricter with the recall they reach.
 * Between two points the rule moves with log(1 - recall): missed hits fall by factors as the gain
 * that is given up falls by factors; between points of different effort (list, cells) there is
 * nothing to follow, and the greater is taken. That every curve gets stricter, effort first, is
 * checked when it is written and when it is read, so a higher wanted recall never gives a laxer
 * rule. */
#include "index/walk_rule.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/disk_search.h" /* the limits of a search */
#include "storage/base/bytes.h"

#define CELLS_USUAL 100u
#define CELLS_FEWEST 16u
/* A file is opened with a page more or less in memory than was calibrated; that is the same. */
#define SHARE_SLACK 0.005f

/* The section, little-endian: a header, then per curve its own and its points. */
#define MAGIC "ANNDWALK"
#define VERSION 1u
#define HEADER_MAGIC 0
#define HEADER_VERSION 8    /* u32; readers refuse one they do not know */
#define HEADER_CRC 12       /* u32 CRC-32C of all bytes, this field as zero */
#define HEADER_BYTES_ALL 16 /* u64 */
#define HEADER_QUERIES 24   /* u32 */
#define HEADER_FLAGS 28     /* u32, bit 0: own_queries */
#define HEADER_CURVES 32    /* u32 */
#define HEADER_RESERVED 36  /* zero, checked */
#define HEADER_SIZE 64
#define CURVE_K 0      /* u32 */
#define CURVE_SHARE 4  /* f32 */
#define CURVE_POINTS 8 /* u32, then u32 zero */
#define CURVE_SIZE 16
#define POINT_RECALL 0 /* f32 */
#define POINT_LIST 4   /* u32 */
#define POINT_CELLS 8
#define POINT_PATIENCE 12
#define POINT_GAIN 16 /* f32 */
#define POINT_REACHED 20
#define POINT_READS 24 /* f32, then u32 zero */
#define POINT_SIZE 32

static uint32_t at_least(uint32_t value, uint32_t least)
{
    return value > least ? value : least;
}

/* The curve to go by; NULL when there is none. */
static const struct walk_curve *curve_for(const struct walk_calibration *calibration, uint32_t k,
                                          double resident_share)
{
    const struct walk_curve *best = NULL;
    double best_ratio = 0;

    if (!calibration)
        return NULL;
    for (uint32_t i = 0; i < calibration->curve_count; i++) {
        const struct walk_curve *curve = &calibration->curves[i];
        double ratio = fabs(log((double)k / curve->k));

        if (curve->point_count == 0)
            continue;
        /* Curves ascend by (k, share): a later one of the same k fits better as long as it is not
         * above the share, and the first is taken whatever its share. */
        if (!best || ratio < best_ratio ||
            (curve->k == best->k && curve->resident_share <= (float)resident_share + SHARE_SLACK)) {
            best = curve;
            best_ratio = ratio;
        }
    }
    return best;
}

/* Between two whole numbers, upwards: the stricter side. */
static uint32_t between(uint32_t from, uint32_t to, double t)
{
    double value = ceil(from + t * ((double)to - from));

    return value < to ? (uint32_t)value : to;
}

/* The rule of a curve, at the curve's own k. */
static void curve_rule(const struct walk_curve *curve, double recall, struct walk_rule *out,
                       float *reads)
{
    const struct walk_point *last = &curve->points[curve->point_count - 1];
    const struct walk_point *low = &curve->points[0], *high;
    double t;

    if (!((float)recall > low->recall)) { /* a recall that is no number as well */
        *out = low->rule;
        *reads = low->reads;
        return;
    }
    if ((float)recall >= last->recall) {
        double missed = recall < 1 ? 1 - recall : 0, missed_last = 1 - (double)last->recall;

        *out = last->rule;
        *reads = (float)recall > last->recall ? 0 : last->reads;
        if (missed < missed_last)
            out->gain = (float)(last->rule.gain * (missed / missed_last));
        return;
    }
    while ((float)recall >= low[1].recall)
        low++;
    high = low + 1;
    if ((float)recall == low->recall) {
        *out = low->rule;
        *reads = low->reads;
        return;
    }
    if (low->rule.cells != high->rule.cells || low->rule.search_list != high->rule.search_list) {
        *out = high->rule; /* of another effort: nothing was measured in between */
        *reads = high->reads;
        return;
    }
    t = log((1 - (double)low->recall) / (1 - recall)) /
        log((1 - (double)low->recall) / (1 - (double)high->recall));
    t = t < 0 ? 0 : t > 1 ? 1 : t; /* recall as a double may lie just outside the two floats */
    *out = (struct walk_rule){
        .search_list = high->rule.search_list,
        .cells = high->rule.cells,
        .patience = between(low->rule.patience, high->rule.patience, t),
        .gain = high->rule.gain,
    };
    if (high->rule.gain > 0) {
        double gain = exp((1 - t) * log(low->rule.gain) + t * log(high->rule.gain));

        /* Rounding must not step past either end. */
        out->gain = (float)fmin(fmax(gain, high->rule.gain), low->rule.gain);
    }
    *reads = (float)((1 - t) * low->reads + t * high->reads);
}

void walk_rule_for_recall(const struct walk_calibration *calibration, double recall, uint32_t k,
                          double resident_share, struct walk_rule *out, float *reads_expected)
{
    const struct walk_curve *curve;
    float reads = 0;

    k = at_least(k, 1);
    curve = curve_for(calibration, k, resident_share);
    if (curve) {
        curve_rule(curve, recall, out, &reads);
        out->gain *= (float)k / (float)curve->k;
        if (k > curve->k) { /* the list has to hold as many times more */
            uint64_t wanted = (uint64_t)out->search_list * k / curve->k;

            out->search_list = wanted < SEARCH_LIST_MAX ? (uint32_t)wanted : SEARCH_LIST_MAX;
        }
        if (k != curve->k)
            reads = 0;
    } else {
        double missed = recall < 1 ? 1 - recall : 0;
        uint64_t list = at_least(100, 4 * (k < SEARCH_LIST_MAX ? k : SEARCH_LIST_MAX));

        /* With codes that steer well, a third of the hits still expected turn out to be there. */
        *out = (struct walk_rule){.search_list =
                                      list < SEARCH_LIST_MAX ? (uint32_t)list : SEARCH_LIST_MAX,
                                  .cells = CELLS_USUAL,
                                  .patience = 4,
                                  .gain = (float)(k * missed / 3)};
    }
    out->search_list = at_least(out->search_list, k);
    if (reads_expected)
        *reads_expected = reads;
}

void walk_rule_for_list(const struct walk_calibration *calibration, uint32_t search_list,
                        uint32_t k, struct walk_rule *out)
{
    (void)calibration; /* an explicit list is the same walk with and without one */
    search_list = at_least(search_list, k);
    *out = (struct walk_rule){
        .search_list = search_list,
        /* A short list asks for a cheap walk: it must not pay for a wide scan first. */
        .cells = search_list < CELLS_FEWEST  ? CELLS_FEWEST
                 : search_list > CELLS_USUAL ? CELLS_USUAL
                                             : search_list,
        .patience = 0,
        .gain = 0,
    };
}

/* What a calibration must be to be written, and what a read one is checked for. Points get
 * stricter, or a higher recall would stop earlier. */
static const char *curve_finding(const struct walk_curve *curve, const struct walk_curve *before)
{
    if (curve->k == 0 || curve->k > SEARCH_LIST_MAX)
        return "k out of range";
    if (!(curve->resident_share >= 0 && curve->resident_share <= 1))
        return "resident share out of range";
    if (before && (curve->k < before->k ||
                   (curve->k == before->k && curve->resident_share <= before->resident_share)))
        return "curves out of order";
    if (curve->point_count == 0 || curve->point_count > WALK_POINTS_MAX)
        return "too many points or none";
    for (uint32_t i = 0; i < curve->point_count; i++) {
        const struct walk_point *point = &curve->points[i];
        const struct walk_point *last = &curve->points[i > 0 ? i - 1 : 0];

        if (!(point->recall > 0 && point->recall < 1) || !(point->reached >= 0) ||
            point->reached > 1 || !(point->reads >= 0) || !isfinite(point->reads))
            return "recall or reads out of range";
        if (point->rule.search_list == 0 || point->rule.search_list > SEARCH_LIST_MAX ||
            point->rule.cells > DISK_SEARCH_CELLS_MAX || point->rule.patience > SEARCH_LIST_MAX ||
            !(point->rule.gain >= 0) || !isfinite(point->rule.gain))
            return "rule out of range";
        if (i > 0 && point->recall <= last->recall)
            return "points out of order";
        if (i > 0 &&
            (point->rule.search_list < last->rule.search_list ||
             point->rule.cells < last->rule.cells ||
             (point->rule.search_list == last->rule.search_list &&
              point->rule.cells == last->rule.cells &&
              (point->rule.patience < last->rule.patience || point->rule.gain > last->rule.gain))))
            return "a higher recall with a laxer rule";
    }
    return NULL;
}

/* The CRC of the bytes with its own field as zero. */
static uint32_t stored_crc(const uint8_t *data, size_t bytes)
{
    static const uint8_t zero[4];
    uint32_t crc = crc32c(0, data, HEADER_CRC);

    crc = crc32c(crc, zero, sizeof zero);
    return crc32c(crc, data + HEADER_BYTES_ALL, bytes - HEADER_BYTES_ALL);
}

int walk_calibration_encode(const struct walk_calibration *calibration, uint8_t **out,
                            size_t *bytes, struct error *err)
{
    size_t size = HEADER_SIZE;
    uint8_t *data, *at;

    if (calibration->curve_count > WALK_CURVES_MAX)
        return error_set(err, ERR_INTERNAL, "a calibration of %" PRIu32 " curves",
                         calibration->curve_count);
    for (uint32_t i = 0; i < calibration->curve_count; i++) {
        const struct walk_curve *curve = &calibration->curves[i];
        const char *finding = curve_finding(curve, i ? curve - 1 : NULL);

        if (finding)
            return error_set(err, ERR_INTERNAL, "curve %" PRIu32 " of a calibration: %s", i,
                             finding);
        size += CURVE_SIZE + (size_t)curve->point_count * POINT_SIZE;
    }
    data = calloc(1, size);
    if (!data)
        return error_set(err, ERR_NOMEM, "no memory for a calibration of %zu bytes", size);
    memcpy(data + HEADER_MAGIC, MAGIC, sizeof MAGIC - 1);
    store_u32(data + HEADER_VERSION, VERSION);
    store_u64(data + HEADER_BYTES_ALL, size);
    store_u32(data + HEADER_QUERIES, calibration->query_count);
    store_u32(data + HEADER_FLAGS, calibration->own_queries);
    store_u32(data + HEADER_CURVES, calibration->curve_count);
    at = data + HEADER_SIZE;
    for (uint32_t i = 0; i < calibration->curve_count; i++) {
        const struct walk_curve *curve = &calibration->curves[i];

        store_u32(at + CURVE_K, curve->k);
        store_f32(at + CURVE_SHARE, curve->resident_share);
        store_u32(at + CURVE_POINTS, curve->point_count);
        at += CURVE_SIZE;
        for (uint32_t p = 0; p < curve->point_count; p++, at += POINT_SIZE) {
            const struct walk_point *point = &curve->points[p];

            store_f32(at + POINT_RECALL, point->recall);
            store_u32(at + POINT_LIST, point->rule.search_list);
            store_u32(at + POINT_CELLS, point->rule.cells);
            store_u32(at + POINT_PATIENCE, point->rule.patience);
            store_f32(at + POINT_GAIN, point->rule.gain);
            store_f32(at + POINT_REACHED, point->reached);
            store_f32(at + POINT_READS, point->reads);
        }
    }
    store_u32(data + HEADER_CRC, stored_crc(data, size));
    *out = data;
    *bytes = size;
    return 0;
}

static int check_header(const uint8_t *data, size_t bytes, const char *where, struct error *err)
{
    if (bytes < HEADER_SIZE)
        return error_set(err, ERR_CORRUPT, "%s: a calibration wants at least %d bytes, found %zu",
                         where, HEADER_SIZE, bytes);
    if (memcmp(data + HEADER_MAGIC, MAGIC, sizeof MAGIC - 1) != 0)
        return error_set(err, ERR_CORRUPT, "%s: no calibration, its magic is wrong", where);
    if (load_u32(data + HEADER_VERSION) != VERSION)
        return error_set(err, ERR_UNSUPPORTED, "%s: calibration version %u, this program reads %u",
                         where, load_u32(data + HEADER_VERSION), VERSION);
    if (load_u64(data + HEADER_BYTES_ALL) != bytes)
        return error_set(err, ERR_CORRUPT, "%s: calibration of %" PRIu64 " bytes, found %zu", where,
                         load_u64(data + HEADER_BYTES_ALL), bytes);
    if (stored_crc(data, bytes) != load_u32(data + HEADER_CRC))
        return error_set(err, ERR_CORRUPT, "%s: calibration checksum %08x, computed %08x", where,
                         load_u32(data + HEADER_CRC), stored_crc(data, bytes));
    /* The checksum says the writer meant this; the writer may still be hostile. */
    for (uint32_t i = HEADER_RESERVED; i < HEADER_SIZE; i++) {
        if (data[i] != 0)
            return error_set(err, ERR_CORRUPT, "%s: reserved byte %u of a calibration is not zero",
                             where, i);
    }
    if (load_u32(data + HEADER_FLAGS) > 1 || load_u32(data + HEADER_CURVES) > WALK_CURVES_MAX)
        return error_set(err, ERR_CORRUPT, "%s: a calibration of %u curves with flags %x", where,
                         load_u32(data + HEADER_CURVES), load_u32(data + HEADER_FLAGS));
    return 0;
}

int walk_calibration_decode(const uint8_t *data, size_t bytes, const char *where,
                            struct walk_calibration *out, struct error *err)
{
    size_t at = HEADER_SIZE;

    if (check_header(data, bytes, where, err) < 0)
        return -1;
    memset(out, 0, sizeof *out);
    out->query_count = load_u32(data + HEADER_QUERIES);
    out->own_queries = load_u32(data + HEADER_FLAGS) & 1;
    for (uint32_t i = 0; i < load_u32(data + HEADER_CURVES); i++) {
        struct walk_curve *curve = &out->curves[i];
        const char *finding;

        if (bytes - at < CURVE_SIZE)
            return error_set(err, ERR_CORRUPT, "%s: a calibration ends in curve %" PRIu32, where,
                             i);
        curve->k = load_u32(data + at + CURVE_K);
        curve->resident_share = load_f32(data + at + CURVE_SHARE);
        curve->point_count = load_u32(data + at + CURVE_POINTS);
        if (load_u32(data + at + CURVE_POINTS + 4) != 0)
            return error_set(err, ERR_CORRUPT, "%s: reserved bytes of curve %" PRIu32 " not zero",
                             where, i);
        at += CURVE_SIZE;
        if (curve->point_count > WALK_POINTS_MAX ||
            bytes - at < (size_t)curve->point_count * POINT_SIZE)
            return error_set(err, ERR_CORRUPT, "%s: curve %" PRIu32 " has %" PRIu32 " points",
                             where, i, curve->point_count);
        for (uint32_t p = 0; p < curve->point_count; p++, at += POINT_SIZE) {
            const uint8_t *stored = data + at;

            curve->points[p] = (struct walk_point){
                .recall = load_f32(stored + POINT_RECALL),
                .rule = {.search_list = load_u32(stored + POINT_LIST),
                         .cells = load_u32(stored + POINT_CELLS),
                         .patience = load_u32(stored + POINT_PATIENCE),
                         .gain = load_f32(stored + POINT_GAIN)},
                .reached = load_f32(stored + POINT_REACHED),
                .reads = load_f32(stored + POINT_READS),
            };
            if (load_u32(stored + POINT_READS + 4) != 0)
                return error_set(err, ERR_CORRUPT,
                                 "%s: reserved bytes of curve %" PRIu32 " not zero", where, i);
        }
        finding = curve_finding(curve, i ? curve - 1 : NULL);
        if (finding)
            return error_set(err, ERR_CORRUPT, "%s: curve %" PRIu32 ": %s", where, i, finding);
    }
    if (at != bytes)
        return error_set(err, ERR_CORRUPT, "%s: %zu bytes after a calibration", where, bytes - at);
    out->curve_count = load_u32(data + HEADER_CURVES);
    return 0;
}
