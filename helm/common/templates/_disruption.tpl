{{- /*
Keeps the head's pod where it is while nodes are drained: the attempt ends with it, whereas workers are replaced.
minAvailable and not maxUnavailable: Kubernetes does not know how many pods a RayCluster wants. More than any release has: it may have several
runs at once, and none of their heads is one too many.
*/}}
{{- define "common.disruptionBudget" -}}
{{- if .Values.podDisruptionBudget.enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "common.name" . | quote }}
  namespace: {{ .Release.Namespace | quote }}
  labels:
    {{- include "common.labels" . | nindent 4 }}
spec:
  minAvailable: 1000
  selector:
    matchLabels:
      {{- include "common.selectorLabels" . | nindent 6 }}
      app.kubernetes.io/component: head
{{- end }}
{{- end }}
