// The definition corner by corner, for the rare chunk whose numbers are not all finite. There the
// fast path, which gives a weight of 0 to cells that the definition does not read, would turn an
// infinity in such a cell into NaN.

template <class T>
struct Corner {
  int64_t row;
  T weight, x_slope, y_slope;
};

// The corners that the definition reads for one point; at most four.
template <class T>
struct Corners {
  Corner<T> list[4];
  int count = 0;
};

template <class T>
void corners_of(const Problem& problem, const Level& level, const T* location, int64_t point,
                Corners<T>& corners) {
  // Locates a whole vector for one point: this path is rare and its numbers must be the same.
  T padded[2 * kWidth<T>] = {location[0], location[1]};
  const Located<T> points = locate_points<T>(problem, point_table<T>(problem), padded, point);
  const int64_t x = static_cast<int64_t>(points.x.base[0]);
  const int64_t y = static_cast<int64_t>(points.y.base[0]);
  corners.count = 0;
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (points.y.is_corner[i][0] != 0 && points.x.is_corner[j][0] != 0) {
        corners.list[corners.count++] = {
            level.first_row + (y + i) * level.width + x + j,
            points.y.weights[i][0] * points.x.weights[j][0],
            points.x.slopes[j][0] * points.y.weights[i][0],
            points.y.slopes[i][0] * points.x.weights[j][0],
        };
      }
    }
  }
}

// Calls visit(point, attention weight, corners) for each point of the look at `row` of the tensors
// [B, Q, M, ...].
template <class T, class Visit>
void for_each_point(const Problem& problem, const GivenPoints<T>& given, int64_t row, Visit visit) {
  const int64_t first = row * problem.total_points;
  Corners<T> corners;
  for (const Level& level : problem.levels) {
    for (int64_t k = 0; k < level.num_points; ++k) {
      const int64_t point = level.first_point + k;
      corners_of(problem, level, given.locations + 2 * (first + point), point, corners);
      visit(point, given.attention_weights[first + point], corners);
    }
  }
}

template <class S>
Compute<S> number(const S* from) {
  return load_partial<S, Compute<S>>(from, 1)[0];
}

template <class S, class T>
void exact_forward(const Problem& problem, const GivenPoints<T>& given, int64_t row, const S* rows,
                   int64_t row_stride, S* output) {
  for (int64_t channel = 0; channel < problem.head_dim; ++channel) {
    T sum = 0;
    for_each_point(problem, given, row, [&](int64_t, T attention, const Corners<T>& corners) {
      T sampled = 0;
      for (int i = 0; i < corners.count; ++i) {
        const Corner<T>& corner = corners.list[i];
        sampled += corner.weight * number(rows + corner.row * row_stride + channel);
      }
      sum += attention * sampled;
    });
    store_partial<S, T>(output + channel, splat<T>(sum), 1);
  }
}

// grad_output, grad_locations and grad_weights are those of the look.
template <class S, class T>
void exact_backward_points(const Problem& problem, const GivenPoints<T>& given, int64_t row,
                           const S* rows, int64_t row_stride, const S* grad_output,
                           T* grad_locations, T* grad_weights) {
  for_each_point(problem, given, row, [&](int64_t at, T attention, const Corners<T>& corners) {
    T grad_x = 0, grad_y = 0, grad_weight = 0;
    for (int i = 0; i < corners.count; ++i) {
      const Corner<T>& corner = corners.list[i];
      T dot = 0;
      for (int64_t channel = 0; channel < problem.head_dim; ++channel) {
        dot += number(grad_output + channel) * number(rows + corner.row * row_stride + channel);
      }
      grad_weight += corner.weight * dot;
      grad_x += corner.x_slope * (attention * dot);
      grad_y += corner.y_slope * (attention * dot);
    }
    grad_locations[2 * at] = grad_x;
    grad_locations[2 * at + 1] = grad_y;
    grad_weights[at] = grad_weight;
  });
}

// Adds to the rows of the band only (see band.inl).
template <class S, class T>
void exact_backward_value(const Problem& problem, const GivenPoints<T>& given, int64_t row,
                          const S* grad_output, const Band& band, T* grad_rows,
                          int64_t row_stride) {
  for_each_point(problem, given, row, [&](int64_t, T attention, const Corners<T>& corners) {
    for (int i = 0; i < corners.count; ++i) {
      const Corner<T>& corner = corners.list[i];
      if (!band.owns(corner.row)) {
        continue;
      }
      T* grad_row = grad_rows + corner.row * row_stride;
      for (int64_t channel = 0; channel < problem.head_dim; ++channel) {
        grad_row[channel] += corner.weight * attention * number(grad_output + channel);
      }
    }
  });
}
