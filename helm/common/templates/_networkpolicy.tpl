{{- /*
Connections to and from the release's pods. No other pod may reach Ray, since Ray runs all code that it receives.
The policy selects pods by the release, since the operator puts a random text into the name of a job's cluster.
Takes dict root ports cluster submitters: ports of stores beside networkPolicy.storePorts, the name of a shared cluster
or "", and whether submitters of other releases are allowed.
*/}}
{{- define "common.networkPolicy" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- if $policy.enabled }}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "common.name" .root | quote }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "common.labels" .root | nindent 4 }}
spec:
  podSelector:
    matchLabels:
      {{- include "common.selectorLabels" .root | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    {{- /* Ray's processes choose their ports, so all ports are open within a release. */}}
    - from:
        - podSelector:
            matchLabels:
              {{- include "common.selectorLabels" .root | nindent 14 }}
    - from:
        - namespaceSelector:
            {{- with $policy.operatorNamespace }}
            matchLabels:
              kubernetes.io/metadata.name: {{ . | quote }}
            {{- else }} {}
            {{- end }}
          podSelector:
            matchLabels:
              app.kubernetes.io/component: kuberay-operator
      ports:
        - {port: 8265, protocol: TCP}
    {{- if .submitters }}
    {{- /* Submitters of other releases in this namespace. */}}
    - from:
        - podSelector:
            matchLabels:
              app.kubernetes.io/part-of: ray-batch-inference
              app.kubernetes.io/component: submitter
      ports:
        - {port: 8265, protocol: TCP}
    {{- end }}
    {{- $monitoring := .root.Values.monitoring }}
    {{- if $monitoring.podMonitor.enabled }}
    - from:
        - namespaceSelector:
            {{- with $monitoring.prometheus.namespace }}
            matchLabels:
              kubernetes.io/metadata.name: {{ . | quote }}
            {{- else }} {}
            {{- end }}
          podSelector:
            {{- with $monitoring.prometheus.podLabels }}
            matchLabels:
              {{- toYaml . | nindent 14 }}
            {{- else }} {}
            {{- end }}
      ports:
        - {port: 8080, protocol: TCP}
    {{- end }}
    {{- with $policy.ingress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  egress:
    - to:
        - podSelector:
            matchLabels:
              {{- include "common.selectorLabels" .root | nindent 14 }}
    {{- with .cluster }}
    - to:
        - podSelector:
            matchLabels:
              ray.io/cluster: {{ . | quote }}
              ray.io/node-type: head
      ports:
        - {port: 8265, protocol: TCP}
    {{- end }}
    {{- include "common.egress" . | nindent 4 }}
{{- end }}
{{- end }}

{{- /* Connections from pods to anything outside their release: dict root ports. */}}
{{- define "common.egress" -}}
{{- $policy := .root.Values.networkPolicy -}}
{{- /* The cluster's DNS, and the DNS cache that some clusters have on each node. */}}
- to:
    - namespaceSelector: {}
    - ipBlock: {cidr: 169.254.20.10/32}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- /* Object stores, weights, and with autoscaling the API server: addresses that no policy can know. */}}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: [169.254.0.0/16]
    - ipBlock:
        cidr: "::/0"
        except: ["fd00:ec2::/32", "fe80::/10"]
  ports:
    {{- $ports := concat $policy.storePorts (default (list) .ports) }}
    {{- if .root.Values.autoscaling.enabled }}{{ $ports = concat $ports (list 443 6443) }}{{ end }}
    {{- range $ports | uniq }}
    - {port: {{ int64 . }}, protocol: TCP}
    {{- end }}
{{- with .ports }}
{{- /* A store may be a pod, and some networks do not match pods by ipBlock. */}}
- to:
    - namespaceSelector: {}
  ports:
    {{- range . }}
    - {port: {{ int64 . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- if $policy.metadataService }}
{{- /* GKE's metadata server and its port on the node, EC2's, EKS Pod Identity's. */}}
- to:
    - ipBlock: {cidr: 169.254.169.254/32}
    - ipBlock: {cidr: 169.254.169.252/32}
    - ipBlock: {cidr: 169.254.170.23/32}
    - ipBlock: {cidr: "fd00:ec2::/32"}
  ports:
    - {port: 80, protocol: TCP}
    - {port: 988, protocol: TCP}
{{- end }}
{{- with $policy.egress }}
{{ toYaml . }}
{{- end }}
{{- end }}
