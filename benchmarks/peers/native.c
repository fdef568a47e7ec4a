/* The review job's training in one thread of plain code: what is left when nothing stands around the arithmetic. */

#include <math.h>
#include <stdint.h>

static const float BETA1 = 0.9f, BETA2 = 0.999f, EPS = 1e-8f;

/* Adam over all parameters, as torch.optim.Adam has it; leaves the gradient zero. */
static void adam(int64_t size, float *restrict weight, float *restrict first, float *restrict second,
                 float *restrict gradient, int64_t step, double rate)
{
    const float scale = (float)(rate / (1.0 - pow(0.9, (double)step)));
    const float root = (float)(1.0 / sqrt(1.0 - pow(0.999, (double)step)));
    for (int64_t i = 0; i < size; i++) {
        const float g = gradient[i];
        first[i] += (1.0f - BETA1) * (g - first[i]);
        second[i] = BETA2 * second[i] + (1.0f - BETA2) * g * g;
        weight[i] -= scale * first[i] / (sqrtf(second[i]) * root + EPS);
        gradient[i] = 0.0f;
    }
}

/* Trains `num_batches` batches of `batch_size` rows.
 *
 * ids, offsets  the rows' distinct token ids, row by row, and where each row begins [rows + 1]
 * targets       0 or 1 by row
 * order         row numbers, [num_batches * batch_size]
 * weight, first, second, gradient   [num_features + 1], the bias last; Adam's averages; zeros
 * logits        scratch, [batch_size]
 * step          optimizer steps before the first of these
 * losses        out, [num_batches]
 * returns       rows that were classified right
 */
int64_t train(const int32_t *ids, const int64_t *offsets, const float *targets, const int64_t *order,
              int64_t num_batches, int64_t batch_size, int64_t num_features, float *weight, float *first,
              float *second, float *gradient, float *logits, int64_t step, double rate, double *losses)
{
    int64_t correct = 0;
    for (int64_t batch = 0; batch < num_batches; batch++, order += batch_size) {
        for (int64_t row = 0; row < batch_size; row++) {
            float sum = weight[num_features];
            for (int64_t k = offsets[order[row]]; k < offsets[order[row] + 1]; k++)
                sum += weight[ids[k]];
            logits[row] = sum;
        }
        float loss = 0.0f, bias = 0.0f;
        for (int64_t row = 0; row < batch_size; row++) {
            const float logit = logits[row], target = targets[order[row]];
            const float small = expf(-fabsf(logit));
            const float probability = (logit >= 0.0f ? 1.0f : small) / (1.0f + small);
            loss += fmaxf(logit, 0.0f) - logit * target + logf(1.0f + small);
            correct += (logit > 0.0f) == (target > 0.5f);
            logits[row] = (probability - target) / (float)batch_size;
            bias += logits[row];
        }
        losses[batch] = loss / (double)batch_size;
        gradient[num_features] = bias;
        for (int64_t row = 0; row < batch_size; row++)
            for (int64_t k = offsets[order[row]]; k < offsets[order[row] + 1]; k++)
                gradient[ids[k]] += logits[row];
        adam(num_features + 1, weight, first, second, gradient, ++step, rate);
    }
    return correct;
}
