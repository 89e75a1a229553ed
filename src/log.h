/* log: what the service says, one line per event on stderr.
 *
 * A line is "2026-01-31T12:00:00.123Z LEVEL text": time in UTC, text in UTF-8. Control characters
 * and bytes that are not UTF-8 come out as \xNN, so whatever a client sent cannot break a line or
 * reach a terminal; a line ends at LOG_LINE_BYTES_MAX. One write per line. Any thread. */
#ifndef ANND_SRC_LOG_H
#define ANND_SRC_LOG_H

#include <stddef.h>
#include <stdint.h>

#define LOG_LINE_BYTES_MAX 1024u

enum log_level { LOG_LEVEL_INFO, LOG_LEVEL_WARNING, LOG_LEVEL_ERROR };

/* Lines go to this descriptor; 2 until told otherwise. */
void log_to(int fd);

void log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_warning(const char *format, ...) __attribute__((format(printf, 1, 2)));
void log_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* At most `per_minute` lines a minute; how many were left out stands in the next one. One static
 * struct per place that calls. */
struct log_gate {
    uint64_t window_start_us;
    uint32_t written;
    uint32_t suppressed;
};
void log_gated(struct log_gate *gate, uint32_t per_minute, enum log_level level, const char *format,
               ...) __attribute__((format(printf, 4, 5)));

/* The line as log_* would write it, for tests: into out (LOG_LINE_BYTES_MAX); its length with the
 * newline. realtime_ms is milliseconds since 1970. */
size_t log_format_line(char *out, int64_t realtime_ms, enum log_level level, const char *text);

#endif
